"""What is changed for speed changes no answer, and leaves alone what it does not fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from fewmask.deploy.predictor import open_session
from fewmask.deploy.tuning import absorb_affine, flatten_last_resize
from fewmask.models import build_encoder, build_segmenter

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def enlarging(scales: list[float], channels: int = 1, mode: str = "linear") -> ModelProto:
    """A 1x1 convolution of (1, 3, 6, 8) and an enlargement of its maps."""
    weight = np.random.default_rng(0).standard_normal((channels, 3, 1, 1)).astype(np.float32)
    shape = [1, channels, int(6 * scales[2]), int(8 * scales[3])]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["small"], name="conv"),
            helper.make_node(
                "Resize", ["small", "", "scales"], ["logits"], name="resize", mode=mode,
                coordinate_transformation_mode="half_pixel",
            ),
        ],
        "enlarging",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array(scales, np.float32), "scales")],
        value_info=[helper.make_tensor_value_info("small", TensorProto.FLOAT, [1, channels, 6, 8])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: ModelProto) -> np.ndarray:
    onnx.checker.check_model(model)
    x = np.random.default_rng(1).standard_normal((1, 3, 6, 8)).astype(np.float32)
    return open_session(model.SerializeToString(), 1).run(["logits"], {"x": x})[0]


@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 4, 2.5]])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_plane_is_enlarged_as_the_map_was(scales, mode):
    model, before = enlarging(scales, mode=mode), run(enlarging(scales, mode=mode))
    flatten_last_resize(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Reshape", "Resize", "Reshape"]
    after = run(model)
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_a_map_of_several_channels_and_a_network_without_enlargement_are_left_alone():
    several, plain = enlarging([1, 1, 2, 2], channels=2), enlarging([1, 1, 2, 2])
    del plain.graph.node[1]
    plain.graph.output[0].name = "small"
    for model in (several, plain):
        before = model.SerializeToString()
        flatten_last_resize(model)
        assert model.SerializeToString() == before


def test_the_absorbed_normalisation_gives_the_network_the_same_input():
    torch.manual_seed(0)
    encoder = build_encoder("tiny", size=32)
    encoder.input_affine.expect((0.1, 0.6, 0.5), (0.5, 0.1, 0.7))
    segmenter = build_segmenter("tiny_unet", encoder).eval()
    picture = torch.rand(1, 3, 32, 32)
    expected = segmenter(normalised(picture, MEAN, STD)).logits
    mean, std = absorb_affine(segmenter, MEAN, STD)
    assert not any(name.startswith("encoder.input_affine") for name in segmenter.state_dict())
    torch.testing.assert_close(segmenter(normalised(picture, mean, std)).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_network_without_one_keeps_mean_and_std():
    assert absorb_affine(nn.Conv2d(3, 1, 1), MEAN, STD) == (list(MEAN), list(STD))
    segmenter = build_segmenter("tiny_unet", build_encoder("tiny", size=32))
    assert absorb_affine(segmenter, MEAN, STD) == (list(MEAN), list(STD))


def normalised(picture: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

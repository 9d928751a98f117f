"""The graph around the network computes what training computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from fewmask.data.preprocess import MEAN, STD, predict_probability, resize_image
from fewmask.deploy.graph import wrap_network
from fewmask.deploy.predictor import open_session
from fewmask.types import SegOutput
from tests.deploy.darkness import GAIN, darkness_network


class Darkness(nn.Module):
    def forward(self, image: torch.Tensor) -> SegOutput:
        return SegOutput(-GAIN * image[:, :1], [])


def resized_by_graph(image: np.ndarray, size: int) -> np.ndarray:
    model = wrap_network(darkness_network(size), size, MEAN, STD)
    model.graph.output.append(helper.make_tensor_value_info("image/resized", TensorProto.UINT8, [1, size, size, 3]))
    return open_session(model.SerializeToString()).run(["image/resized"], {"image": image})[0][0]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size", "share"),
    [
        (64, 64, 64, 0), (128, 256, 64, 0), (32, 64, 64, 0), (1, 1, 64, 0),
        (197, 331, 64, 1e-3), (331, 197, 64, 1e-3), (1000, 90, 64, 1e-3), (1500, 2000, 96, 1e-3), (257, 1, 64, 1e-3),
        # Enlarging makes ties (the mean of two neighbours), and a tie falls either way.
        (64, 64, 96, 0.1), (20, 33, 96, 0.1),
    ],
)  # fmt: skip
def test_the_graph_resizes_as_training_does(height: int, width: int, size: int, share: float) -> None:
    image = noise(height, width)
    difference = np.abs(resized_by_graph(image, size).astype(int) - resize_image(image, size))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.sampled_from([16, 33, 64]), seed=st.integers(0, 99))
def test_probability_equals_the_torch_pipeline_at_any_size(height: int, width: int, size: int, seed: int) -> None:
    image = noise(height, width, seed)
    session = open_session(wrap_network(darkness_network(size), size, MEAN, STD).SerializeToString())
    found = session.run(["probability"], {"image": image})[0]
    expected = predict_probability(Darkness(), image, size)
    assert found.shape == (height, width)
    assert found.dtype == np.float32
    # One grey level moves a logit by GAIN / (255 * STD[0]), and a sigmoid rises by at most a quarter of that.
    assert np.abs(found - expected).max() <= GAIN / (255 * STD[0]) / 4 + 1e-5
    assert np.abs(found - expected).mean() <= 1e-3


def test_flat_pictures_keep_their_value_to_the_border() -> None:
    for value in (0, 7, 255):
        resized = resized_by_graph(np.full((211, 98, 3), value, np.uint8), 64)
        assert (resized == value).all()

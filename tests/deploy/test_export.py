"""An exported file agrees with torch, says what it is, and is not written when it does not agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fewmask
from fewmask.data.preprocess import MEAN, STD, predict_probability
from fewmask.deploy.export import (
    EXACT_DIFFERENCE,
    MASK_DISAGREEMENT,
    MAX_DIFFERENCE,
    MEAN_DIFFERENCE,
    export_onnx,
    probe_images,
)
from fewmask.deploy.predictor import Predictor
from fewmask.models import build_encoder, build_segmenter
from fewmask.types import SegOutput, UserError


class Tiny(nn.Module):
    """Two convolutions with a batch norm whose statistics are not the identity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 1, 3, padding=1),
        )
        self(torch.randn(4, 3, 32, 32) * 2 + 1)

    def forward(self, image: Tensor) -> SegOutput:
        hidden = self.norm(self.first(image)).relu()
        return SegOutput(self.last(hidden) * 4, [hidden])


class Fixed(Tiny):
    def forward(self, image: Tensor) -> SegOutput:
        if image.shape[-1] == 256:
            raise UserError("It needs another size.")
        return super().forward(image)


class Noisy(Tiny):
    def forward(self, image: Tensor) -> SegOutput:
        clean = super().forward(image)
        return SegOutput(clean.logits + torch.randn_like(clean.logits), clean.features)


class Branching(Tiny):
    def forward(self, image: Tensor) -> SegOutput:
        output = super().forward(image)
        return output if image.mean().item() > 0 else SegOutput(-output.logits, output.features)


def segmenter_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "tiny":
        return Tiny()
    encoder = build_encoder("tiny" if name == "tiny_unet" else "efficientnet_lite0", size=64)
    encoder.input_affine.expect((0.5, 0.45, 0.4), (0.25, 0.3, 0.2))
    segmenter = build_segmenter(name, encoder)
    # The running statistics of an untrained network would shrink or blow up every signal.
    for module in segmenter.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        segmenter.train()(torch.randn(8, 3, 64, 64))
    return segmenter


@pytest.mark.parametrize("name", ["tiny", "unet", "tiny_unet"])
def test_parity_with_torch_on_every_probe(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    segmenter = segmenter_of(name).train()
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    facts = export_onnx(segmenter, 64, tmp_path / "model.onnx", {})
    assert capfd.readouterr() == ("", "")
    assert segmenter.training
    assert all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert facts["num_parameters"] == sum(p.numel() for p in segmenter.parameters())
    assert facts["gmacs_256"] == pytest.approx(16 * facts["gmacs"], rel=0.01)
    parity = facts["parity"]
    assert parity["exact_difference"] <= EXACT_DIFFERENCE
    assert parity["max_difference"] <= MAX_DIFFERENCE
    assert parity["mean_difference"] <= MEAN_DIFFERENCE
    assert parity["mask_disagreement"] <= MASK_DISAGREEMENT
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    expected = predict_probability(segmenter.eval(), image, 64)
    assert np.ptp(expected) > 0.05
    assert np.abs(expected - Predictor(tmp_path / "model.onnx")(image)).max() <= EXACT_DIFFERENCE


def test_metadata_round_trip_and_no_trace_of_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "sub" / "m.onnx"
    metadata = {"metrics": {"test": {"dice": 0.91}}, "data_licence": "CC0", "classes": ["skin", "lesion"], "none": None}
    export_onnx(Tiny(), 32, out, metadata, threshold=0.4)
    predictor = Predictor(out)
    assert predictor.threshold == 0.4
    assert metadata.items() <= predictor.metadata.items()
    assert predictor.metadata["mean"] == list(MEAN)
    assert predictor.metadata["std"] == list(STD)
    assert predictor.metadata["size"] == 32
    assert predictor.metadata["fewmask_version"] == fewmask.__version__
    assert "Not a medical device" in predictor.metadata["note"]
    content = out.read_bytes()
    assert str(Path(fewmask.__file__).parent).encode() not in content
    assert b".py" not in content
    model = onnx.load(out)
    assert not [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert json.loads(next(p.value for p in model.metadata_props if p.key == "threshold")) == 0.4


def test_a_size_that_256_does_not_fit_is_no_mistake(tmp_path: Path) -> None:
    facts = export_onnx(Fixed(), 24, tmp_path / "model.onnx", {})
    assert facts["gmacs"] == pytest.approx(24**2 * (8 * 27 + 8 * 9) / 1e9)
    assert facts["gmacs_256"] is None


def test_a_network_that_does_not_agree_with_itself_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the earlier one")
    with pytest.raises(UserError, match="does not agree with torch"):
        export_onnx(Noisy(), 32, out, {})
    assert out.read_bytes() == b"the earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    broken = Tiny()
    nn.init.constant_(broken.last.weight, float("nan"))
    with pytest.raises(UserError, match="does not agree"):
        export_onnx(broken, 32, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


def test_a_network_onnx_cannot_express_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="cannot be written as ONNX"):
        export_onnx(Branching(), 32, tmp_path / "model.onnx", {})
    assert capfd.readouterr() == ("", "")


def test_an_unwritable_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        export_onnx(Tiny(), 32, tmp_path / "file" / "model.onnx", {})


@pytest.mark.parametrize("size", [64, 2048])
def test_probes_stay_within_eight_million_pixels_and_hold_exact_sizes(size: int) -> None:
    sizes = [image.shape[:2] for image in probe_images(size)]
    assert max(height * width for height, width in sizes) <= 8 * 2**20
    assert (size, size) in sizes
    assert any(height * width > size * size and (height % size, width % size) == (0, 0) for height, width in sizes)

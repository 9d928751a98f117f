"""A model comes back from its file as it was; any other file is refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewmask.models import build_encoder, build_segmenter, load_model, save_model
from fewmask.types import UserError

NARROW = {"decoder_channels": (16, 8, 8, 4)}


@pytest.fixture
def segmenter():
    torch.manual_seed(0)
    return build_segmenter("transunet", build_encoder("vit_tiny_patch16", size=32), **NARROW, logit_stride=2).eval()


@torch.no_grad()
def test_segmenter_round_trip(segmenter, tmp_path):
    image = torch.randn(1, 3, 32, 32)
    save_model(tmp_path / "model.safetensors", segmenter, {"threshold": 0.4})
    again, spec = load_model(tmp_path / "model.safetensors")
    assert torch.equal(again(image).logits, segmenter(image).logits)
    assert (spec["kind"], spec["size"], spec["threshold"]) == ("segmenter", 32, 0.4)
    assert spec["segmenter"]["settings"]["logit_stride"] == 2
    assert not again.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@torch.no_grad()
def test_encoder_round_trip_keeps_settings_weights_and_normalisation(tmp_path):
    encoder = build_encoder("resnet18", size=64, norm_eps=1e-3).to(memory_format=torch.channels_last).eval()
    encoder.input_affine.expect((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    save_model(tmp_path / "model.safetensors", encoder)
    again, spec = load_model(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(image)[-1], encoder(image)[-1])
    assert spec["encoder"]["settings"] == {"drop_path": 0.0, "norm_eps": 1e-3}


def test_header_is_json_that_needs_no_torch(segmenter, tmp_path):
    save_model(tmp_path / "m.safetensors", segmenter)
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["fewmask"])["encoder"]["name"] == "vit_tiny_patch16"


def test_extra_cannot_lie_about_the_model(segmenter, tmp_path):
    save_model(tmp_path / "m.safetensors", segmenter, {"kind": "encoder", "size": 1})
    assert load_model(tmp_path / "m.safetensors")[1]["size"] == 32


def test_failed_write_leaves_the_old_file_alone(segmenter, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, segmenter)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_model(path, segmenter, {"not json": object()})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_file(segmenter, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, segmenter)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as a model"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 64])
def test_foreign_bytes(content, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a model"):
        load_model(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a model"):
        load_model(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "header", [None, "[]", "{", '{"kind": "encoder"}', '{"kind": "car", "encoder": {"name": "x"}}']
)
def test_safetensors_of_another_program(header, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"fewmask": header} if header else None)
    with pytest.raises(UserError, match="fewmask did not write"):
        load_model(path)


@pytest.mark.parametrize(
    "encoder",
    [{"name": "nonsense", "settings": {}}, {"name": "resnet18", "settings": {"a": 1}}, {"name": "resnet18"}],
)
def test_header_that_cannot_be_built(encoder, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"fewmask": json.dumps({"kind": "encoder", "encoder": encoder, "size": 32})})
    with pytest.raises(UserError, match="cannot be built again"):
        load_model(path)

"""The mobile network keeps to its bound on the encoders it is meant for, and states its features truly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewmask.deploy.export import EXACT_DIFFERENCE, export_onnx
from fewmask.models import build_encoder, build_segmenter, load_model, save_model
from fewmask.models.complexity import complexity
from fewmask.types import UserError

COUNTS = {"efficientnet_lite0": 2_998_113, "mobilenetv4_conv_small": 1_342_657, "mobilenetv2_100": 1_849_569}


@pytest.mark.parametrize(("encoder", "num_parameters"), list(COUNTS.items()))
def test_the_stated_bound_holds(encoder, num_parameters):
    cost = complexity(build_segmenter("mobile_unet", build_encoder(encoder, size=64)), 64)
    assert cost["num_parameters"] == num_parameters
    assert cost["num_parameters"] <= 3_000_000


def test_the_packaged_weights_are_in_it():
    encoder = build_encoder("efficientnet_lite0", "packaged", size=64)
    before = encoder.body.model.blocks[6][0].conv_pwl.weight.clone()
    segmenter = build_segmenter("mobile_unet", encoder)
    assert segmenter.encoder is encoder
    assert torch.equal(segmenter.encoder.body.model.blocks[6][0].conv_pwl.weight, before)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_logits_and_features_have_the_stated_sizes(size):
    segmenter = build_segmenter("mobile_unet", build_encoder("mobilenetv4_conv_small", size=size)).eval()
    with torch.no_grad():
        output = segmenter(torch.randn(1, 3, size, size))
    assert output.logits.shape == (1, 1, size, size)
    assert [size // f.shape[-1] for f in output.features] == [2, 4, 8, 16, 32]
    assert [f.shape[1] for f in output.features] == [24, 24, 32, 48, segmenter.encoder.channels[-1]]


def test_every_parameter_learns_in_mixed_precision():
    torch.manual_seed(0)
    segmenter = build_segmenter("mobile_unet", build_encoder("mobilenetv4_conv_small", size=64))
    with torch.autocast("cpu", torch.bfloat16):
        logits = segmenter(torch.randn(2, 3, 64, 64)).logits
    logits.float().square().mean().backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_saved_one_comes_back_and_is_exported(tmp_path: Path):
    torch.manual_seed(0)
    encoder = build_encoder("mobilenetv4_conv_small", size=64)
    segmenter = build_segmenter("mobile_unet", encoder, decoder_channels=(16, 16, 8, 8)).eval()
    save_model(tmp_path / "model.safetensors", segmenter)
    again, _ = load_model(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image).logits, segmenter(image).logits)
    assert export_onnx(again, 64, tmp_path / "model.onnx", {})["parity"]["exact_difference"] <= EXACT_DIFFERENCE


@pytest.mark.parametrize(
    ("encoder", "settings", "sentence"),
    [
        ("vit_tiny_patch16", {}, "'mobile_unet' needs a CNN of timm .* 'vit_tiny_patch16' is not: choose"),
        ("tiny", {}, "'mobile_unet' needs a CNN of timm .* 'tiny' is not"),
        ("convnext_atto", {}, "features at strides 2 to 32, which 'convnext_atto' is not"),
        ("resnet18", {"decoder_channels": (8, 8, 0, 8)}, "needs 4 widths of at least 1"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(encoder, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build_segmenter("mobile_unet", build_encoder(encoder, size=64), **settings)

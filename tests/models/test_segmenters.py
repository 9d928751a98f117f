"""Segmenters return logits at the size of the image, and our U-Net is the library's, parameter for parameter."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from fewmask.models import build_encoder, build_segmenter
from fewmask.types import UserError

NARROW = {"decoder_channels": (16, 8, 8, 4)}


@torch.no_grad()
def test_unet_equals_smp_with_the_same_weights():
    torch.manual_seed(0)
    theirs = smp.Unet("tu-efficientnet_lite0", encoder_weights=None).eval()
    ours = build_segmenter("unet", build_encoder("efficientnet_lite0", size=64)).eval()
    weights = {k.replace("encoder.", "encoder.body.", 1): v for k, v in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == ["encoder.input_affine.scale", "encoder.input_affine.shift"]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(image).logits, theirs(image))


@pytest.mark.parametrize("size", [32, 64, 96])
def test_unet_sizes(size):
    segmenter = build_segmenter("unet", build_encoder("resnet18", size=size), decoder_channels=(8, 8, 8, 8, 4))
    output = segmenter(torch.randn(2, 3, size, size))
    assert output.logits.shape == (2, 1, size, size)
    assert [f.shape[-1] for f in output.features] == [size // s for s in (1, 2, 4, 8, 16, 32)]


def test_unet_on_an_encoder_that_starts_at_stride_four():
    segmenter = build_segmenter("unet", build_encoder("convnext_atto", size=64), decoder_channels=(8, 8, 8, 8, 4))
    assert segmenter(torch.randn(1, 3, 64, 64)).logits.shape == (1, 1, 64, 64)


@pytest.mark.parametrize(
    ("encoder", "size", "logit_stride"),
    [("vit_tiny_patch8", 32, 1), ("vit_tiny_patch8", 24, 2), ("vit_tiny_patch16", 48, 1), ("vit_tiny_patch16", 32, 2)],
)
def test_transunet_sizes(encoder, logit_stride, size):
    segmenter = build_segmenter("transunet", build_encoder(encoder, size=size), logit_stride=logit_stride, **NARROW)
    output = segmenter(torch.randn(2, 3, size, size))
    assert output.logits.shape == (2, 1, size, size)
    sides = [f.shape[-1] for f in output.features]
    assert sides == sorted(sides, reverse=True)
    assert (sides[0], sides[-1]) == (size // logit_stride, size // segmenter.encoder.patch)


@pytest.mark.parametrize(
    ("encoder", "segmenter", "settings"),
    [("resnet18", "unet", {}), ("vit_tiny_patch16", "transunet", NARROW), ("vit_tiny_patch8", "transunet", NARROW)],
)
def test_every_parameter_learns(encoder, segmenter, settings):
    torch.manual_seed(0)
    model = build_segmenter(segmenter, build_encoder(encoder, size=64), **settings)
    model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_the_encoder_given_is_the_encoder_used():
    encoder = build_encoder("resnet18", size=32)
    assert build_segmenter("unet", encoder).encoder is encoder


@pytest.mark.parametrize(
    ("encoder", "segmenter", "settings", "sentence"),
    [
        ("vit_tiny_patch16", "unet", {}, "'unet' needs a CNN of timm, which .* is not: .* 'transunet' for a ViT"),
        ("resnet18", "transunet", {}, "'transunet' needs a ViT .* a cnn: choose model.segmenter='unet'"),
        ("resnet18", "unett", {}, "no segmenter named 'unett'. Did you mean 'unet'"),
        (
            "resnet18",
            "unet",
            {"decoder_channels": (8, 8)},
            "'model.segmenter_settings.decoder_channels' needs 5 widths",
        ),
        ("resnet18", "unet", {"depth": 4}, "Unknown setting 'model.segmenter_settings.depth'. Valid ones: decod"),
        ("vit_tiny_patch16", "transunet", {"decoder_channels": (8, 8, 8, 0)}, "needs 4 widths"),
        ("vit_tiny_patch16", "transunet", {"stem_channels": (0, 8)}, "stem_channels' needs 2 widths"),
        ("vit_tiny_patch16", "transunet", {"logit_stride": 4}, "1 or 2 and cannot be 4"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(encoder, segmenter, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build_segmenter(segmenter, build_encoder(encoder, size=32), **settings)

"""CNN encoders come from timm by name, state their features truly, and keep depthwise convolutions in float32."""

from __future__ import annotations

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.models.cnn import DepthwiseConv2d
from fewmask.types import UserError


@pytest.mark.parametrize(("name", "finest"), [("efficientnet_lite0", 2), ("resnet18", 2), ("convnext_atto", 4)])
def test_features_have_the_stated_strides_and_channels(name, finest):
    encoder = build_encoder(name, size=64)
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == list(encoder.channels)
    assert [64 // f.shape[-1] for f in features] == list(encoder.strides)
    assert encoder.strides[0] == finest
    assert encoder.strides[-1] == 32


def test_depthwise_convolution_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    layer = DepthwiseConv2d(8, 8, 3, padding=1, groups=8)
    image = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(image)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, layer(image))
    encoder = build_encoder("efficientnet_lite0", size=32)
    depthwise = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 16
    assert all(isinstance(m, DepthwiseConv2d) for m in depthwise)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("efficientnet_lit0", {}, "no encoder named 'efficientnet_lit0'. Did you mean 'efficientnet_lite0'"),
        ("resnet18", {"size": 100}, "image size of 100 .* multiple of 32: choose 96 or 128"),
        ("resnet18", {"size": 0}, "image size of 0 .* choose 32"),
        ("vit_base_patch16_224", {}, "'vit_base_patch16_224' cannot be an encoder .* choose a CNN"),
        ("inception_v3", {}, "'inception_v3' cannot be an encoder .*Kernel size"),
        ("inception_v3", {"size": 96}, "an image of 96 pixels gives features of 45, 20, 9, 4, 1"),
        ("vgg11", {"drop_path": 0.1}, "'vgg11' cannot be an encoder with these settings"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(name, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build_encoder(name, **{"size": 64, **settings})

"""The head gives a map at the stride asked for, whatever the encoder's strides, and reads the two features it names."""

from __future__ import annotations

import pytest
import torch

from fewmask.auxiliary.dense_head import DenseHead
from fewmask.models import build_encoder
from fewmask.types import UserError
from tests.auxiliary.tiny import TinyTrunk


@pytest.mark.parametrize("encoder", ["tiny", "resnet18", "vit_tiny_patch8", "vit_tiny_patch16"])
@pytest.mark.parametrize("stride", [1, 4])
@torch.no_grad()
def test_the_map_has_the_stride_asked_for(encoder, stride):
    trunk = TinyTrunk(64) if encoder == "tiny" else build_encoder(encoder, size=64)
    features = trunk.eval()(torch.randn(2, 3, 64, 64))
    head = DenseHead(trunk, 2, stride)
    out = head(features)
    assert out.shape == (2, 2, 64 // stride, 64 // stride)
    assert head.finer == {"tiny": 1, "resnet18": 1}.get(encoder, 0)  # the feature at stride 4, or a ViT's first
    for changed in range(len(features)):
        other = [f + (i == changed) for i, f in enumerate(features)]
        read = changed in (head.finer, len(features) - 1)
        assert torch.equal(head(other), out) is not read


def test_an_encoder_without_a_fitting_stride_is_told():
    with pytest.raises(UserError, match=r"multiple of 4, and the encoder 'tiny' has strides \[2\]"):
        DenseHead(TinyTrunk(channels=(8,)), 1, 4)

"""The SimMIM loss is the mean absolute error on hidden pixels, from a picture in which they cannot be seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.pretrain.simmim import SimMIM
from tests.pretrain.pictures import raw_batch

ENCODERS = ["vit_tiny_patch16", "resnet18"]


def simmim(encoder: str, **settings) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(build_encoder(encoder, size=64), **settings).eval()


@pytest.mark.parametrize("mask", ["random", "semantic"])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_loss_equals_the_equation(encoder, mask):
    subject = simmim(encoder, mask_patch=16, mask=mask)
    batch = replace(raw_batch(3, side=64), image=torch.randn(3, 3, 64, 64))
    torch.manual_seed(1)
    mask = subject.masking(batch)
    torch.manual_seed(1)
    loss = subject(batch)["loss"].item()
    prediction = subject.reconstruct(batch.image, mask)
    errors = []
    for i in range(3):
        for cell in mask[i].nonzero().flatten().tolist():
            row, column = divmod(cell, 4)
            window = (i, slice(None), slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16))
            errors.append((prediction[window] - batch.image[window]).abs().mean().item())
    assert len(errors) == 3 * round(16 * 0.6)
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_semantic_mask_takes_as_large_a_share_of_each_superpixel():
    subject, batch = simmim("resnet18", mask_patch=16, mask_ratio=0.5, mask="semantic"), raw_batch(3, side=64)
    quarters = torch.arange(64) // 32
    batch.extra["superpixels"] = (quarters[:, None] * 2 + quarters).byte().expand(3, 1, -1, -1).contiguous()
    assert subject.maps()["superpixels"].num_segments == 8
    moved = subject.views()(batch).extra["superpixels"]
    assert moved.shape == (3, 1, 64, 64)
    hidden = subject.masking(batch).view(3, 4, 4)
    assert (hidden.view(3, 2, 2, 2, 2).sum((2, 4)) == 2).all()


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_hidden_pixels_do_not_change_the_prediction(encoder):
    subject, image = simmim(encoder), torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[True, False, False, True]])
    changed = image.clone()
    changed[..., :32, :32] += 5
    changed[..., 32:, 32:] -= 5
    assert torch.equal(subject.reconstruct(image, mask), subject.reconstruct(changed, mask))
    seen = image.clone()
    seen[..., 32:, :32] += 5
    assert not torch.equal(subject.reconstruct(image, mask), subject.reconstruct(seen, mask))

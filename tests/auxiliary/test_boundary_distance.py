"""The map that is to be predicted follows from the mask by a formula, at the edges of what a mask can be too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewmask.auxiliary.boundary_distance import distance_map
from fewmask.types import UserError
from tests.auxiliary.test_distance import literal
from tests.auxiliary.tiny import make, raw_batch


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from([16, 24, 32]), radius=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_target_equals_brute_force(size, radius, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = F.interpolate(torch.rand(2, 1, 3, 3, generator=generator), (size, size), mode="bilinear") > 0.5
    found = distance_map(mask.float(), radius)
    for i in range(2):
        cover = mask[i, 0].float().view(size // 4, 4, size // 4, 4).mean((1, 3))
        inside = (cover >= min(1.0, float(cover.max())) / 2) & (cover > 0)
        expected = torch.from_numpy(literal(inside.numpy())) / (radius * size / 4)
        torch.testing.assert_close(found[i, 0].double(), expected.clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_straight_border_has_a_ramp():
    mask = torch.zeros(1, 1, 80, 80)
    mask[..., :40] = 1
    row = distance_map(mask, 0.1)[0, 0, 7]
    expected = ((torch.arange(20) - 9.5) / 2).clamp(-1, 1)  # a tenth of the side is two cells
    torch.testing.assert_close(row, expected)


def test_empty_and_full_masks_have_constant_maps():
    mask = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16), torch.full((1, 16, 16), 1e-3)])
    assert distance_map(mask, 0.1).amax((1, 2, 3)).tolist() == [1, -1, 1]
    assert distance_map(mask, 0.1).amin((1, 2, 3)).tolist() == [1, -1, 1]


def test_a_lesion_smaller_than_a_cell_does_not_vanish():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 13, 18] = 1
    found = distance_map(mask, 0.1)[0, 0]
    assert (found < 0).nonzero().tolist() == [[3, 4]]


def test_the_map_belongs_to_the_mask_that_the_picture_shows():
    task, _ = make("boundary_distance")
    torch.manual_seed(0)
    raw = raw_batch(8)
    raw.image[:] = raw.mask
    seen = task.views()(raw)
    torch.testing.assert_close(seen.extra["distance"], distance_map(seen.mask, 0.1))
    cover = F.avg_pool2d(seen.mask, 4)
    sure = (cover > 0.6) | (cover < 0.4)
    assert torch.equal((seen.extra["distance"] < 0)[sure], (cover > 0.5)[sure])


def test_batches_without_masks_are_refused():
    task, _ = make("boundary_distance")
    with pytest.raises(UserError, match="needs a mask for every image"):
        task.views()(replace(raw_batch(), mask=None))


@torch.no_grad()
def test_loss_is_the_mean_absolute_error():
    task, trunk = make("boundary_distance")
    batch = task.views()(raw_batch(3))
    predicted = task.head(trunk.eval()(batch.image))
    errors = [(predicted[i] - batch.extra["distance"][i]).abs().mean().item() for i in range(3)]
    assert task(trunk, batch)["loss"].item() == pytest.approx(sum(errors) / 3, rel=1e-5)

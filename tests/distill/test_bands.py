"""Bands against scipy's morphology, and which positions the controls drop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fewmask.distill.bands import BandMasking, boundary_band, inside, outside, random_mask
from fewmask.types import UserError
from tests.distill.networks import blobs

CONTROLS = ("whole", "inside", "outside")


def reference(mask: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Band, inside and outside of a bool (s, s) mask by scipy; the edge of the image is no boundary."""
    square = np.ones((2 * radius + 1, 2 * radius + 1), bool)
    dilated = ndimage.binary_dilation(mask, square)
    eroded = ndimage.binary_erosion(mask, square, border_value=1)
    return dilated & ~eroded, eroded, ~dilated


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(5, 24), radius=st.integers(1, 5), smooth=st.floats(0.5, 3))
def test_bands_agree_with_scipy_at_every_border(seed, size, radius, smooth):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), smooth)
    mask = noise > np.quantile(noise, 0.6)
    y = torch.tensor(mask)[None, None].float()
    for got, expected in zip(
        (boundary_band(y, radius), inside(y, radius), outside(y, radius)), reference(mask, radius), strict=True
    ):
        np.testing.assert_array_equal(got[0, 0].numpy(), expected)


@pytest.mark.parametrize("place", [(0, 4), (0, 0), (8, 12)])
def test_a_lesion_cut_by_the_edge_has_no_boundary_there(place):
    y = torch.zeros(1, 1, 16, 16)
    y[..., place[0] : place[0] + 8, place[1] : place[1] + 8] = 1
    band = boundary_band(y, 2)[0, 0]
    expected, _, _ = reference(y[0, 0].bool().numpy(), 2)
    np.testing.assert_array_equal(band.numpy(), expected)
    if place == (0, 4):
        assert not band[0, 8]  # in the lesion, at the image's edge
        assert band[0, 4]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masks_without_a_boundary_have_no_band(value):
    y = torch.full((2, 1, 8, 8), value)
    assert not boundary_band(y, 3).any()
    assert inside(y, 3).all() == outside(y, 3).logical_not().all() == bool(value)
    for region in ("boundary", "none", *CONTROLS):
        where, share = BandMasking(region=region)(y, (4, 4))
        assert not random_mask(where, share).any()


def test_soft_masks_are_read_at_one_half():
    y = blobs()
    assert torch.equal(boundary_band(0.49 * y + 0.25, 1), boundary_band(y, 1))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([(4, 4), (8, 8), (5, 7), (16, 16), (32, 32)]))
def test_at_feature_size_every_position_is_in_one_region(seed, size):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(2, 1, 16, 16)), (0, 0, 2, 2))
    y = torch.tensor(noise > 0).float()
    found = [BandMasking(0.06, 0.5, region)(y, size)[0] for region in ("boundary", "inside", "outside")]
    assert torch.equal(torch.stack(found).sum(0), torch.ones(2, 1, *size))


def test_a_position_that_sees_any_of_the_band_belongs_to_it():
    y = blobs()
    band, _ = BandMasking(0.06)(y, (4, 4))
    expected = [
        [[boundary_band(y, 1)[i, 0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].any() for c in range(4)] for r in range(4)]
        for i in range(3)
    ]
    assert torch.equal(band[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("size", [(32, 32), (8, 8)])
@pytest.mark.parametrize("region", CONTROLS)
def test_controls_drop_as_much_as_the_band_in_expectation(region, size):
    y = torch.zeros(3, 1, 64, 64)
    y[0, :, 12:52, 12:52] = 1
    y[1, :, 8:56, 0:40] = 1
    y[2, :, 10:50, 8:60] = 1
    wanted, chance = BandMasking(0.03, 0.2)(y, size)
    expected = wanted.sum((1, 2, 3)) * 0.2
    where, share = BandMasking(0.03, 0.2, region)(y, size)
    assert chance.unique() == torch.tensor([0.2])
    assert (share < 1).all()
    torch.testing.assert_close((where * share).sum((1, 2, 3)), expected)
    torch.manual_seed(0)
    drawn = torch.stack([random_mask(where, share).sum((1, 2, 3)).float() for _ in range(1000)]).mean(0)
    torch.testing.assert_close(drawn, expected, rtol=0.06, atol=0.1)


def test_a_region_too_small_for_its_share_is_dropped_whole():
    y = torch.zeros(1, 1, 32, 32)
    y[..., 10:15, 10:15] = 1  # of 5 x 5 pixels, 3 x 3 are inside a band of radius 1
    where, share = BandMasking(0.03, 1.0, "inside")(y, (32, 32))
    assert where.sum() == 9
    assert share.item() == 1
    assert torch.equal(random_mask(where, share), where)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_masked_share_of_a_region_is_the_probability(share, seed):
    torch.manual_seed(seed)
    region = torch.rand(1, 1, 200, 200) < 0.5
    dropped = random_mask(region, share)
    assert not (dropped & ~region).any()
    assert dropped.sum() / region.sum() == pytest.approx(share, abs=5 * (0.25 / 20000) ** 0.5)


def test_every_image_has_a_draw_of_its_own():
    torch.manual_seed(0)
    dropped = random_mask(torch.ones(2, 1, 16, 16), 0.5)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0.0}, "width"), ({"width": 0.6}, "width"), ({"drop": 1.1}, "drop"), ({"drop": -0.1}, "drop")],
)
def test_impossible_settings_are_the_users_mistake(options, message):
    with pytest.raises(UserError, match=message):
        BandMasking(**options)

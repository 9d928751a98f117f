"""Augmentation: geometry against torch, torchvision and exact permutations; colour against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from fewmask.data import geometry
from fewmask.data.augment import DERMOSCOPY_COLOUR, PlainViews, PretrainViews, SegmentViews
from fewmask.data.colour import Chain, ColourJitter, GaussianBlur, GaussianNoise, RandomGrayscale, adjust, blur
from fewmask.data.preprocess import denormalise, normalise
from fewmask.types import Batch, UserError

VIEWS = {
    "plain": PlainViews(24),
    "pretrain": PretrainViews(24),
    "pretrain_colour": PretrainViews(24, colour=Chain((ColourJitter(), RandomGrayscale(), GaussianBlur()))),
    "segment": SegmentViews(24),
    "flips": SegmentViews.flips_only(24),
    "xray": SegmentViews.xray(24),
}
RANDOM = [name for name in VIEWS if name != "plain"]


def raw_batch(num: int = 4, size: int = 27, seed: int = 0, masked: bool = True) -> Batch:
    """A raw batch in the memory layout of the cache (channels last), smooth enough to be resampled."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 4, 5, 5, generator=generator)
    fine = (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    image = fine[:, :3].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return Batch(image, [str(i) for i in range(num)], fine[:, 3:].clone() if masked else None)


def same_pictures(num: int, size: int = 27) -> Batch:
    """The same raw picture, several times."""
    one = raw_batch(1, size)
    return Batch(one.image.expand(num, -1, -1, -1), ["x"] * num, one.mask.expand(num, -1, -1, -1))


# What every Views promises


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_views_return_a_normalised_batch_and_leave_the_raw_one_alone(name, num, masked):
    batch = raw_batch(num, masked=masked)
    batch.label, batch.extra = torch.arange(num), {"map": torch.rand(num, 2)}
    image = batch.image.clone()
    mask = None if batch.mask is None else batch.mask.clone()
    out = VIEWS[name](batch)
    assert torch.equal(batch.image, image)
    assert out.image.shape == (num, 3, 24, 24)
    assert out.image.dtype == torch.float32
    picture = out.image * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    assert picture.min() >= -1e-5
    assert picture.max() <= 1 + 1e-5
    assert out.names == batch.names
    assert torch.equal(out.label, batch.label)
    assert torch.equal(out.extra["map"], batch.extra["map"])
    if mask is None:
        assert out.mask is None
    else:
        assert torch.equal(batch.mask, mask)
        assert out.mask.shape == (num, 1, 24, 24)
        assert out.mask.dtype == torch.float32
        assert 0 <= out.mask.min() <= out.mask.max() <= 1


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_decides_everything(name):
    batch = raw_batch(6)
    torch.manual_seed(5)
    first = VIEWS[name](batch)
    torch.manual_seed(5)
    again = VIEWS[name](batch)
    torch.manual_seed(6)
    other = VIEWS[name](batch)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("name", RANDOM)
def test_each_picture_of_a_batch_has_a_draw_of_its_own(name):
    torch.manual_seed(0)
    out = VIEWS[name](same_pictures(8))
    distinct = {picture.numpy().round(3).tobytes() for picture in out.image}
    assert len(distinct) >= (3 if name == "flips" else 8)


@pytest.mark.parametrize("name", VIEWS)
def test_memory_layout_does_not_matter(name):
    batch = raw_batch(3)
    assert not batch.image.is_contiguous()
    torch.manual_seed(1)
    first = VIEWS[name](batch)
    torch.manual_seed(1)
    second = VIEWS[name](Batch(batch.image.contiguous(), batch.names, batch.mask))
    assert torch.equal(first.image, second.image)


def test_a_batch_that_is_no_longer_raw_is_refused():
    batch = raw_batch(2)
    with pytest.raises(TypeError, match="uint8"):
        PlainViews(24)(Batch(batch.image.float(), batch.names))


# Geometry


@given(size_in=st.integers(8, 40), size=st.integers(8, 40))
@settings(max_examples=25, deadline=None)
def test_plain_views_are_torchs_antialiased_resize(size_in, size):
    batch = raw_batch(2, size_in)
    expected = F.interpolate(batch.image.float() / 255, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(PlainViews(size)(batch).image, normalise(expected), atol=2e-4, rtol=0)


@given(seed=st.integers(0, 1000), size=st.sampled_from([16, 24, 27]))
@settings(max_examples=20, deadline=None)
def test_settings_that_change_nothing_reproduce_plain_views(seed, size):
    batch = raw_batch(3, seed=seed)
    plain = PlainViews(size)(batch)
    quiet = [
        PretrainViews(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, vertical=False),
        SegmentViews(size, flip=False, vertical=False, geometric=0.0, colour=None),
        SegmentViews(size, flip=False, vertical=False, geometric=0.0, colour=ColourJitter(0, 0, 0, 0)),
    ]
    for views in quiet:
        out = views(batch)
        torch.testing.assert_close(out.image, plain.image, atol=1e-4, rtol=0)
        torch.testing.assert_close(out.mask, plain.mask, atol=1e-5, rtol=0)


def test_an_affine_map_that_changes_nothing_returns_the_picture():
    batch = raw_batch(3, 24)
    views = SegmentViews(
        24, flip=False, vertical=False, rotate=0, scale=(1, 1), translate=0, shear=0, geometric=1, colour=None
    )
    torch.testing.assert_close(views(batch).image, PlainViews(24)(batch).image, atol=1e-4, rtol=0)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(["pretrain", "segment", "flips", "xray"]))
@settings(max_examples=40, deadline=None)
def test_the_mask_follows_its_picture(seed, name):
    batch = raw_batch(5, seed=seed)
    batch.image = batch.mask.expand(-1, 3, -1, -1)
    views = VIEWS[name] if name == "pretrain" else SegmentViews(**{**vars(VIEWS[name]), "colour": None})
    torch.manual_seed(seed)
    out = views(batch)
    torch.testing.assert_close(denormalise(out.image), out.mask.expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(["segment", "flips", "xray", "plain"]))
@settings(max_examples=40, deadline=None)
def test_features_follow_their_picture_at_their_own_resolution(seed, name):
    batch = raw_batch(5, 24, seed=seed)
    same = batch.mask.half() / 255
    coarse = F.avg_pool2d(same.float(), 3)
    batch.features = [same.expand(-1, 7, -1, -1), coarse.half()]
    torch.manual_seed(seed)
    out = VIEWS[name](batch)
    assert [feature.shape for feature in out.features] == [(5, 7, 24, 24), (5, 1, 8, 8)]
    torch.testing.assert_close(out.features[0].float(), out.mask.expand(-1, 7, -1, -1), atol=2e-3, rtol=0)
    error = (out.features[1].float() - F.avg_pool2d(out.mask, 3)).abs()
    assert error.mean() < 0.06  # at most 0.033 in 300 draws; left where they were, features are at least 0.12 away


def test_flips_are_exact_and_all_four_occur():
    torch.manual_seed(0)
    batch = same_pictures(40, 24)
    out = SegmentViews.flips_only(24)(batch)
    picture = batch.image[0]
    variants = [picture, picture.flip(-1), picture.flip(-2), picture.flip(-1, -2)]
    expected = torch.stack([normalise(variant) for variant in variants])
    difference = (out.image[:, None] - expected).abs().amax((2, 3, 4))
    assert difference.min(1).values.max() < 1e-5
    counts = difference.argmin(1).bincount(minlength=4)
    assert counts.min() >= 3


def test_vertical_flips_can_be_forbidden():
    batch = same_pictures(40, 24)
    for views in (
        PretrainViews(24, (1, 1), (1, 1), vertical=False),
        SegmentViews(24, vertical=False, geometric=0, colour=None),
    ):
        out = denormalise(views(batch).image)
        upright = out.sum(-1)  # row sums do not change when mirrored left-right
        torch.testing.assert_close(upright, upright[:1].expand_as(upright), atol=1e-3, rtol=0)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact_permutations(quarters):
    x = raw_batch(2, 24).image.float()
    zero, one = torch.zeros(2), torch.ones(2)
    matrices = geometry.affine(90.0 * quarters * one, one, zero, torch.zeros(2, 2), torch.ones(2, 2))
    torch.testing.assert_close(geometry.warp(x, matrices, 24), torch.rot90(x, quarters, (-2, -1)), atol=0.01, rtol=0)


def test_mirroring_means_the_same_in_both_kinds_of_geometry():
    x = raw_batch(4, 24).image.float()
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    boxes = geometry.flip_boxes(geometry.whole_boxes(4), flips[:, 0], flips[:, 1])
    zero, one = torch.zeros(4), torch.ones(4)
    matrices = geometry.affine(zero, one, zero, torch.zeros(4, 2), 1 - 2 * flips.float())
    torch.testing.assert_close(geometry.crop_resize(x, boxes, 24), geometry.warp(x, matrices, 24), atol=0.01, rtol=0)


def test_affine_enlarges_and_shifts_as_documented():
    # A shift of a quarter of the side moves what is sampled 6 of 24 pixels to the right and 3 down.
    x = raw_batch(1, 24).image.float()
    zero, one = torch.zeros(1), torch.ones(1)
    shift = geometry.affine(zero, one, zero, torch.tensor([[0.25, 0.125]]), torch.ones(1, 2))
    torch.testing.assert_close(geometry.warp(x, shift, 24)[..., :-3, :-6], x[..., 3:, 6:], atol=0.01, rtol=0)
    twice = geometry.affine(zero, 2 * one, zero, torch.zeros(1, 2), torch.ones(1, 2))
    middle = geometry.crop_resize(x, torch.tensor([[0.25, 0.75, 0.25, 0.75]]), 24)
    torch.testing.assert_close(geometry.warp(x, twice, 24), middle, atol=0.01, rtol=0)


def test_outside_the_picture_is_its_mirror_image():
    x = raw_batch(1, 24).image.float()
    zero, one = torch.zeros(1), torch.ones(1)
    shift = geometry.affine(zero, one, zero, torch.tensor([[0.25, 0.0]]), torch.ones(1, 2))
    moved = geometry.warp(x, shift, 24)
    torch.testing.assert_close(moved[..., -6:], x[..., -6:].flip(-1), atol=0.01, rtol=0)


@given(
    left=st.integers(0, 12), width=st.integers(6, 15), top=st.integers(0, 12), height=st.integers(6, 15),
    size=st.sampled_from([8, 16, 24]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_crop_is_torchvisions_away_from_its_border(left, width, top, height, size):
    x = raw_batch(1, 27).image.float() / 255
    expected = reference.resized_crop(x, top, left, height, width, [size, size], antialias=True)
    box = torch.tensor([[left, left + width, top, top + height]]) / 27
    # torchvision's filter stops at the crop's border, ours sees the neighbours that are there.
    edge = math.ceil(size / min(width, height)) + 1
    inner = slice(edge, -edge)
    torch.testing.assert_close(
        geometry.crop_resize(x, box, size)[..., inner, inner], expected[..., inner, inner], atol=1e-4, rtol=0
    )


def test_resampling_rows_sum_to_one_and_mirror():
    start, end = torch.tensor([0.1, 0.9, 0.0]), torch.tensor([0.7, 0.2, 1.0])
    weights = geometry.interval_weights(start, end, 40, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 13))
    torch.testing.assert_close(geometry.interval_weights(end, start, 40, 13), weights.flip(1), atol=1e-5, rtol=0)


def test_crops_are_drawn_like_torchvisions():
    torch.manual_seed(0)
    num, side = 3000, 1000
    ours = geometry.random_boxes(num, (0.2, 1.0), (3 / 4, 4 / 3))
    width, height = ours[:, 1] - ours[:, 0], ours[:, 3] - ours[:, 2]
    assert ours.min() >= 0
    assert ours.max() <= 1 + 1e-6
    picture = torch.empty(3, side, side)
    drawn = [RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(num)]
    top, left, theirs_height, theirs_width = torch.tensor(drawn).T / side
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    pairs = [
        (width * height, theirs_height * theirs_width), ((width / height).log(), (theirs_width / theirs_height).log()),
        (ours[:, 0], left), (ours[:, 2], top),
    ]  # fmt: skip
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.quantile(quantiles), theirs.quantile(quantiles), atol=0.03, rtol=0)


def test_impossible_crops_fall_back_to_the_whole_image():
    boxes = geometry.random_boxes(5, (1.0, 1.0), (2.0, 3.0))
    assert torch.equal(boxes, geometry.whole_boxes(5))


@pytest.mark.parametrize("make", [
    lambda: PretrainViews(24, scale=(0.0, 1.0)), lambda: PretrainViews(24, ratio=(2.0, 1.0)),
    lambda: SegmentViews(24, scale=(1.2, 0.8)), lambda: GaussianBlur((0.0, 1.0)),
])  # fmt: skip
def test_an_impossible_range_is_the_users_mistake(make):
    with pytest.raises(UserError, match="first <= second"):
        make()


# Colour


def ones(num: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((num,), value)


@given(brightness=st.floats(0.5, 1.2), contrast=st.floats(0.5, 1.3), saturation=st.floats(0.3, 1.5))
@settings(max_examples=30, deadline=None)
def test_brightness_contrast_and_saturation_are_torchvisions_while_nothing_is_clamped(brightness, contrast, saturation):
    x = 0.45 + 0.1 * torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = reference.adjust_brightness(x, brightness)
    expected = reference.adjust_contrast(expected, contrast)
    expected = reference.adjust_saturation(expected, saturation)
    mine = adjust(x, ones(2, brightness), ones(2, contrast), ones(2, saturation), torch.zeros(2))
    torch.testing.assert_close(mine, expected, atol=2e-4, rtol=0)  # torchvision's luma weights end after four digits


def test_hue_keeps_luma_and_gray_and_turns_like_torchvision():
    x = 0.4 + 0.2 * torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    one, luma = ones(3), torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = adjust(x, one, one, one, ones(3, 0.1))
    torch.testing.assert_close((turned * luma).sum(1), (x * luma).sum(1), atol=1e-5, rtol=0)
    gray = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(adjust(gray, one, one, one, ones(3, 0.3)), gray, atol=1e-5, rtol=0)
    torch.testing.assert_close(adjust(turned, one, one, one, ones(3, -0.1)), x, atol=1e-5, rtol=0)
    red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1)
    for turn in (0.08, -0.08):
        change = adjust(red, ones(1), ones(1), ones(1), ones(1, turn)) - red
        expected = reference.adjust_hue(red, turn) - red
        assert (change[0, 1] - change[0, 2]).sign() == (expected[0, 1] - expected[0, 2]).sign()


def test_jitter_of_nothing_and_jitter_of_nobody_change_nothing():
    x = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ColourJitter(0, 0, 0, 0, 1.0)(x), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(ColourJitter(p=0.0)(x), x, atol=1e-6, rtol=0)
    for change in (RandomGrayscale(0.0), GaussianBlur(p=0.0), GaussianNoise(p=0.0)):
        assert torch.equal(change(x), x)


@pytest.mark.parametrize("make", [
    lambda p: ColourJitter(p=p), RandomGrayscale,
    lambda p: GaussianBlur((1.0, 2.0), p), lambda p: GaussianNoise(0.1, p),
])  # fmt: skip
def test_colour_is_applied_with_its_probability_and_stays_in_range(make):
    torch.manual_seed(0)
    x = torch.rand(600, 3, 6, 6)
    before = x.clone()
    out = make(0.3)(x)
    assert torch.equal(x, before)
    changed = (out - x).abs().amax((1, 2, 3)) > 1e-4
    assert 0.22 < changed.float().mean() < 0.38
    assert 0 <= out.min() <= out.max() <= 1 + 1e-6


def test_grayscale_is_the_luma():
    x = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = reference.rgb_to_grayscale(x, num_output_channels=3)
    torch.testing.assert_close(RandomGrayscale(1.0)(x), expected, atol=5e-4, rtol=0)


def test_each_picture_is_blurred_by_its_own_sigma():
    # A kernel cut at its own reach of three sigma, away from the edge where padding differs.
    x = torch.rand(3, 3, 31, 31, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 1.0, 2.0])
    out = blur(x, sigma)
    for picture, blurred, value in zip(x, out, sigma, strict=True):
        side = 2 * math.ceil(3 * float(value)) + 1
        expected = reference.gaussian_blur(picture, [side, side], [float(value)] * 2)
        torch.testing.assert_close(blurred[:, 6:-6, 6:-6], expected[:, 6:-6, 6:-6], atol=1e-6, rtol=0)
        torch.testing.assert_close(blurred, blur(picture[None], value[None])[0], atol=1e-6, rtol=0)


def test_blur_keeps_a_constant_and_works_on_a_picture_smaller_than_its_kernel():
    x = torch.full((2, 3, 3, 3), 0.25)
    torch.testing.assert_close(blur(x, torch.tensor([0.1, 4.0])), x)


def test_the_default_colour_is_on_average_true_to_the_picture():
    torch.manual_seed(0)
    x = torch.full((2000, 3, 8, 8), 0.5)
    x[:, 0] = 0.6
    torch.testing.assert_close(DERMOSCOPY_COLOUR(x).mean((0, 2, 3)), torch.tensor([0.6, 0.5, 0.5]), atol=0.01, rtol=0)

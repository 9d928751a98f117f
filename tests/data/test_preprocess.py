"""One definition of the input: Pillow and torch agree, and the probability map has the image's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fewmask.data.preprocess import (
    MEAN,
    STD,
    denormalise,
    normalise,
    predict_probability,
    resize_image,
    resize_mask,
)
from fewmask.types import SegOutput
from tests.data.conftest import disc, picture


@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.integers(8, 96), seed=st.integers(0, 5))
def test_pillow_and_torch_resize_agree_within_a_grey_level(height, width, size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = resize_image(image, size)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    theirs = F.interpolate(floats, (size, size), mode="bilinear", antialias=True, align_corners=False)
    assert ours.shape == (size, size, 3)
    # Pillow rounds after each of its two passes, by half a level at most, in fixed point.
    assert np.abs(ours - theirs[0].permute(1, 2, 0).numpy()).max() < 1.01


@given(factor=st.integers(1, 8), size=st.integers(2, 16), seed=st.integers(0, 5))
def test_mask_coverage_keeps_the_area_and_is_exact_where_nothing_changes(factor, size, seed):
    mask = np.random.default_rng(seed).random((size * factor, size * factor)) < 0.4
    coverage = resize_mask(mask, size)
    assert coverage.dtype == np.uint8
    if factor == 1:
        assert np.array_equal(coverage, mask * np.uint8(255))
    assert resize_mask(np.ones_like(mask), size).min() == 255
    assert resize_mask(np.zeros_like(mask), size).max() == 0


def test_image_and_mask_stay_aligned():
    mask = disc(301, 203, 60)
    image = np.repeat((mask * np.uint8(255))[..., None], 3, 2)
    assert np.array_equal(resize_image(image, 64)[..., 0], resize_mask(mask, 64))


def test_normalise_takes_bytes_and_floats_to_the_published_scale():
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None]
    expected = (picture() / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert normalise(pixels).dtype == torch.float32
    np.testing.assert_allclose(normalise(pixels)[0].permute(1, 2, 0), expected, atol=1e-5)
    torch.testing.assert_close(normalise(pixels), normalise(pixels / 255.0))
    torch.testing.assert_close(denormalise(normalise(pixels)), pixels / 255.0)
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Recorder(nn.Module):
    """A segmenter that keeps its input and answers with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> SegOutput:
        self.seen = image
        return SegOutput(self.logits, [])


@pytest.mark.parametrize("shape", [(37, 91), (8, 8), (3, 5)])
def test_probability_is_the_sigmoid_of_the_enlarged_logits(shape):
    logits = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    image = picture(height=shape[0], width=shape[1])
    segmenter = Recorder(logits)
    probability = predict_probability(segmenter, image, 8)
    assert probability.shape == shape
    assert probability.dtype == np.float32
    torch.testing.assert_close(
        segmenter.seen, normalise(torch.from_numpy(resize_image(image, 8)).permute(2, 0, 1)[None])
    )
    # bilinear without antialiasing, half-pixel centres, by hand
    y, x = ((np.arange(n) + 0.5) * 8 / n - 0.5 for n in shape)
    y, x = y.clip(0, 7), x.clip(0, 7)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1 = np.minimum(y0 + 1, 7), np.minimum(x0 + 1, 7)
    wy, wx = (y - y0)[:, None], (x - x0)[None]
    a = logits[0, 0].numpy()
    enlarged = (a[y0][:, x0] * (1 - wx) + a[y0][:, x1] * wx) * (1 - wy) + (
        a[y1][:, x0] * (1 - wx) + a[y1][:, x1] * wx
    ) * wy
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-enlarged)), atol=1e-5)


def test_prediction_keeps_no_graph():
    weight = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert predict_probability(Recorder(weight), picture(), 8).max() == 0.5
    assert weight.grad is None

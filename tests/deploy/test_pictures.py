"""Masks on disk and on screen."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import binary_erosion

from fewmask.deploy.pictures import COLOUR, contour, describe_mask, mask_png, overlay_jpeg
from fewmask.types import UserError

MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(mask=MASKS, width=st.integers(1, 4))
def test_contour_is_the_mask_less_its_erosion(mask: np.ndarray, width: int) -> None:
    assert np.array_equal(contour(mask, width), mask & ~binary_erosion(mask, iterations=width, border_value=1))


@given(mask=MASKS)
def test_a_mask_survives_its_png(mask: np.ndarray) -> None:
    read = np.asarray(Image.open(io.BytesIO(mask_png(mask))))
    assert read.dtype == np.uint8
    assert np.array_equal(read, mask * np.uint8(255))


def test_overlay_leaves_the_outside_alone_and_draws_the_edge() -> None:
    image = np.full((80, 80, 3), 120, np.uint8)
    mask = np.zeros((80, 80), bool)
    mask[16:64, 16:64] = True
    drawn = np.asarray(Image.open(io.BytesIO(overlay_jpeg(image, mask)))).astype(int)
    assert np.abs(drawn[:8] - 120).max() <= 2
    inside = drawn[32:48, 32:48].mean(axis=(0, 1))
    expected = 120 + 0.22 * (np.array(COLOUR) - 120)
    assert np.abs(inside - expected).max() <= 3
    assert drawn[16, 24:56, 0].mean() < 90
    assert (image == 120).all()


def test_an_overlay_longer_than_a_jpeg_is_a_sentence() -> None:
    with pytest.raises(UserError, match="65600 x 2 pixels do not fit"):
        overlay_jpeg(np.zeros((2, 65_600, 3), np.uint8), np.zeros((2, 65_600), bool))


def test_area_counts_the_threshold_itself_as_inside() -> None:
    probability = np.array([[0.5, 0.9], [0.1, 0.49]], np.float32)
    described = describe_mask(probability, 0.5)
    assert (described["height"], described["width"], described["area_px"]) == (2, 2, 2)
    assert described["area_percent"] == 50.0
    assert described["mean_probability_inside"] == pytest.approx(0.7)


def test_an_empty_mask_has_no_mean_inside() -> None:
    described = describe_mask(np.zeros((3, 3), np.float32), 0.5)
    assert described["area_px"] == 0
    assert described["mean_probability_inside"] is None

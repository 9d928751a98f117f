"""Relative run lengths, column by column: against a slow reading of the format, and there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays

from fewmask.data.rle import decode, encode

masks = arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12))


def decode_slowly(text: str, height: int, width: int) -> np.ndarray:
    """Walk the pixels one at a time, as the format's description says."""
    mask = np.zeros((height, width), bool)
    numbers = [int(word) for word in text.split()] if text.strip() != "-1" else []
    position = 0
    for skip, run in zip(numbers[::2], numbers[1::2], strict=True):
        position += skip
        for pixel in range(position, position + run):
            mask[pixel % height, pixel // height] = True
        position += run
    return mask


@given(masks)
def test_encoding_comes_back(mask: np.ndarray) -> None:
    assert np.array_equal(decode(encode(mask), mask.shape), mask)


@given(masks)
def test_decoding_agrees_with_a_walk_over_the_pixels(mask: np.ndarray) -> None:
    text = encode(mask)
    assert np.array_equal(decode_slowly(text, *mask.shape), decode(text, mask.shape))


def test_runs_go_down_the_columns() -> None:
    expected = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], bool)
    assert np.array_equal(decode("2 3 6 1", (3, 4)), expected)
    assert encode(expected) == "2 3 6 1"


@pytest.mark.parametrize("text", ["-1", " -1 ", "", "  "])
def test_minus_one_is_an_empty_mask(text: str) -> None:
    assert not decode(text, (5, 7)).any()


def test_the_last_pixel_may_be_covered_and_none_beyond() -> None:
    assert decode("0 12", (3, 4)).all()
    with pytest.raises(ValueError, match="needs 13 pixels"):
        decode("0 13", (3, 4))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 2 3", "pairs"),
        ("1 x", "'x'"),
        ("-3 2", "'-3'"),
        ("1_0 2", "'1_0'"),
        ("1.5 2", "'1.5'"),
        ("3 0", "no pixels"),
        ("-1 -1", "'-1'"),
        ("99999999999 1", "'99999999999'"),
    ],
)
def test_damage_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(text, (10, 10))

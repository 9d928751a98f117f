"""Masks the tests of this folder share: random blobs, noise, single pixels, empty and full ones."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    """Draw two masks of one small shape, with every kind of mask against every other."""
    shape = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    return draw(masks(shape)), draw(masks(shape))


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int]) -> Mask:
    """Draw a mask: empty, full, one pixel, a rectangle (it may touch the border), or noise."""
    kind = draw(st.sampled_from(["empty", "full", "pixel", "rectangle", "noise"]))
    mask = np.zeros(shape, dtype=bool)
    rows, columns = (sorted((draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1)))) for n in shape)
    if kind == "full":
        mask[:] = True
    elif kind == "pixel":
        mask[rows[0], columns[0]] = True
    elif kind == "rectangle":
        mask[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    elif kind == "noise":
        mask = np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < draw(st.floats(0.05, 0.95))
    return mask


def disk(size: int, centre: tuple[float, float], radius: float) -> Mask:
    """Return a disk on a square grid."""
    rows, columns = np.ogrid[:size, :size]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2

"""Run-length encoded masks as SIIM-ACR publishes them: column by column, each start relative to the last run's end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EMPTY = "-1"


def decode(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask bool (h, w) of "skip run skip run ...", pixels counted down each column in turn.

    "-1" and a blank text are an empty mask. Raises ValueError where the text holds anything but pairs of whole numbers,
    a negative skip, a run shorter than 1, or more pixels than `size` (h, w) has. (Format: the competition's own
    `rle2mask`, whose result is to be transposed.)
    """
    height, width = size
    flat = np.zeros(height * width, np.bool_)
    numbers = _numbers(text)
    if numbers.size:
        skips, runs = numbers[0::2], numbers[1::2]
        ends = np.cumsum(skips + runs)
        if ends[-1] > flat.size:
            raise ValueError(f"it needs {ends[-1]} pixels and the image has {width} x {height} = {flat.size}")
        edges = np.zeros(flat.size + 1, np.int64)
        np.add.at(edges, ends - runs, 1)
        np.add.at(edges, ends, -1)
        flat = np.cumsum(edges[:-1]) > 0
    return np.ascontiguousarray(flat.reshape(width, height).T)


def encode(mask: NDArray[np.bool_]) -> str:
    """Return the text that `decode` turns back into the mask bool (h, w); "-1" where it is empty."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    if not edges.size:
        return EMPTY
    return " ".join(map(str, np.diff(edges, prepend=0)))


def _numbers(text: str) -> NDArray[np.int64]:
    words = text.split()
    if words in ([], [EMPTY]):
        return np.zeros(0, np.int64)
    if len(words) % 2:
        raise ValueError(f"it holds {len(words)} numbers, which is not a whole number of pairs")
    # Digits only: int() would take signs and underscores; ten digits keep the sum within 64 bits.
    bad = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) <= 10)), None)
    if bad is not None:
        raise ValueError(f"'{bad}' is not a number of pixels")
    numbers = np.array(words, np.int64)
    if (numbers[1::2] < 1).any():
        raise ValueError("a run has no pixels")
    return numbers

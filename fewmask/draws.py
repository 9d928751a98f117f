"""Random numbers of a batch that several processes share: an image draws the same, however the batch is cut up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fewmask.types import Share

_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def drawing_for(share: Share | None) -> Iterator[None]:
    """Let draws within the block be those of a whole batch, of which this process holds a share; None: all of it."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def rows_of_all(num: int) -> tuple[Tensor, int]:
    """Return which rows int64 (num,) of draws for the whole batch are those of this process, and how many that has.

    `num` is a multiple of the images that the process holds: all images' first views, then all their second ones.
    Raises ValueError where it is not. Our choice.
    """
    share = _SHARE.get()
    if share is None:
        return torch.arange(num), num
    held = len(share.places)
    if num % held:  # and no divmod, which torch.compile cannot trace
        raise ValueError(f"{num} draws are no whole number of views of {held} images.")
    num_views = num // held
    first = torch.arange(num_views)[:, None] * share.total
    return (first + torch.tensor(share.places)).flatten(), num_views * share.total


def draw_each(num: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return a draw for each of `num` images (see `rows_of_all`): their rows of `draw(n)` (n, ...) for all n of them.

    Every process draws for all, from generators in the same state, and takes its own: so these stay in step, and what
    an image draws is the same on any number of processes. Meant for the few numbers that describe a change: of noise
    for whole pictures, each process draws that of all.
    """
    rows, total = rows_of_all(num)
    drawn = draw(total)
    return drawn if total == num else drawn[rows.to(drawn.device)]

"""Signed distance to the border of a mask, exact and batched."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_VALUES = 2**24


def signed_distance(inside: Tensor) -> Tensor:
    """Return the distance of each cell to the border in cells, negative inside, float32 (b, h, w) from bool (b, h, w).

    The Euclidean distance to the nearest cell of the other kind, less half a cell: the border lies midway between two
    cells of different kind. +inf everywhere for an empty mask, -inf for a full one.
    """
    return torch.where(inside, 0.5 - nearest(~inside), nearest(inside) - 0.5)


def nearest(inside: Tensor) -> Tensor:
    """Return the Euclidean distance in cells to the nearest true cell, +inf where there is none, (b, h, w).

    Squared distance is a minimum over rows of a minimum over columns, each a broadcast: h w (h + w) operations an
    image, little for the small maps of a head, and no loop that a GPU would wait for.
    """
    height, width = inside.shape[1:]
    share = max(1, MOST_VALUES // (height * width * max(height, width)))
    squared = [_squared(part) for part in inside.split(share)]
    return torch.cat(squared).sqrt_()


def _squared(inside: Tensor) -> Tensor:
    cost = torch.zeros(inside.shape, device=inside.device).masked_fill_(~inside, torch.inf)
    for axis in (1, 2):
        line = torch.arange(cost.shape[axis], device=cost.device, dtype=cost.dtype)
        steps = (line[:, None] - line) ** 2
        moved = cost.transpose(1, 2) if axis == 1 else cost
        cost = (steps + moved[:, :, None]).amin(3)
        cost = cost.transpose(1, 2) if axis == 1 else cost
    return cost

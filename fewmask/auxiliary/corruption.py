"""How Models Genesis spoils a picture: curves of intensity, shuffled pixels, painted blocks; all batched.

Functions take and return float32 pictures (b, 3, s, s) in [0, 1]. What describes a change is drawn on the host, the
values of single pixels on the device, both from torch's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewmask.auxiliary.task import check_share
from fewmask.data.colour import apply_to_some
from fewmask.draws import draw_each

NUM_KNOTS = 1000
NUM_LEVELS = 256
NUM_BLOCKS = 5
NEXT_BLOCK = 0.95
SHUFFLE_BITS = 20


@dataclass(frozen=True)
class Corruption:
    """Spoil pictures by a curve, by local shuffling and by painting, in the order of the published code.

    `curve`, `shuffle` and `paint` are probabilities per picture; of the painted ones, `outpaint_share` keep only some
    windows, and the others lose some blocks. Raises UserError for a value outside [0, 1].
    """

    curve: float = 0.9
    shuffle: float = 0.5
    paint: float = 0.9
    outpaint_share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("curve", "shuffle", "paint", "outpaint_share"):
            check_share(name, getattr(self, name))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the spoilt pictures."""
        x = apply_to_some(x, self.shuffle, shuffle_locally)
        x = apply_to_some(x, self.curve, lambda some: bend(some, draw_curves(len(some))))
        return apply_to_some(x, self.paint, lambda some: paint(some, self.outpaint_share))


def draw_curves(num: int) -> Tensor:
    """Return random monotone curves (num, 256) from [0, 1] to [0, 1], at the 256 levels of a byte, on the host.

    A cubic Bezier curve from (0, 0) to (1, 1) with two random control points; half of them mirrored, so that they
    fall (paper, section 2.1; code: with probability 1/2).
    """
    controls = draw_each(num, lambda n: torch.rand(2, n, 2).transpose(0, 1)).transpose(0, 1)
    falling = draw_each(num, torch.rand) < 0.5
    across, up = bezier(controls[0]), bezier(controls[1])
    return tabulate(across, torch.where(falling[:, None], up.flip(1), up))


def bezier(controls: Tensor) -> Tensor:
    """Return one coordinate (b, 1000) of cubic Bezier curves from 0 to 1 with two control values (b, 2) each."""
    t = torch.linspace(0, 1, NUM_KNOTS)
    return 3 * (1 - t) ** 2 * t * controls[:, :1] + 3 * (1 - t) * t**2 * controls[:, 1:] + t**3


def tabulate(across: Tensor, up: Tensor) -> Tensor:
    """Return the values (b, 256) at 0, 1/255, ..., 1 of the polylines through the points (`across`, `up`), (b, n) each.

    `across` rises from 0 to 1.
    """
    level = torch.linspace(0, 1, NUM_LEVELS).expand(len(across), -1).contiguous()
    right = torch.searchsorted(across.contiguous(), level).clamp(1, across.shape[1] - 1)
    x0, x1, y0, y1 = across.gather(1, right - 1), across.gather(1, right), up.gather(1, right - 1), up.gather(1, right)
    return torch.lerp(y0, y1, ((level - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1))


def bend(x: Tensor, curves: Tensor) -> Tensor:
    """Return each picture's values sent through its curve (b, 256), linear between the levels."""
    curves = curves.to(x.device)
    position = x.flatten(1) * (NUM_LEVELS - 1)
    low = position.long().clamp_(0, NUM_LEVELS - 2)
    return torch.lerp(curves.gather(1, low), curves.gather(1, low + 1), position - low).view_as(x)


def shuffle_locally(x: Tensor) -> Tensor:
    """Return pictures whose pixels are shuffled within small blocks.

    Code: thousands of random blocks, up to a tenth of the side, shuffled one after the other. Ours: the blocks of a
    grid, whose side (2 pixels to a tenth of the picture's) and offset are drawn per picture, all at once.
    """
    num, _, size, _ = x.shape
    largest = max(2, size // 10)
    side = draw_each(num, lambda n: torch.randint(2, largest + 1, (n,)))
    offset = draw_each(num, lambda n: torch.randint(largest, (n, 2)))
    return shuffle_within(x, block_numbers(size, side, offset).to(x.device))


def block_numbers(size: int, side: Tensor, offset: Tensor) -> Tensor:
    """Return the number int64 (b, size * size) of each pixel's block, in a grid per picture, on the host.

    `side` int64 (b,) is that of its blocks in pixels, `offset` (b, 2) how far up and left the grid is moved.
    """
    line = (torch.arange(size) + offset[..., None]) // side[:, None, None]
    rows, columns = line.unbind(1)
    return (rows[:, :, None] * (size + 1) + columns[:, None]).flatten(1)


def shuffle_within(x: Tensor, block: Tensor) -> Tensor:
    """Return `x` (b, k, h, w) with the pixels of each block, numbered in `block` (b, h * w), in random order."""
    noise = draw_each(len(x), lambda n: torch.randint(1 << SHUFFLE_BITS, (n, block.shape[1]), device=x.device))
    # Two orders that agree in the blocks: pixels sorted by block, and the same with chance inside each block.
    place = block.argsort(dim=1, stable=True)[:, None].expand(-1, x.shape[1], -1)
    source = ((block << SHUFFLE_BITS) + noise).argsort(1)[:, None].expand(-1, x.shape[1], -1)
    flat = x.flatten(2)
    return torch.empty_like(flat).scatter_(2, place, flat.gather(2, source)).view_as(x)


def paint(x: Tensor, outpaint_share: float) -> Tensor:
    """Return pictures with white noise in up to five blocks or, a share of them, everywhere but in such windows.

    Code: blocks of a sixth to a third of the side, windows of three to four sevenths; a block follows
    the one before it with probability 0.95 (ours, for windows: the first is always there, else nothing would be left).
    """
    num, _, size, _ = x.shape
    blocks = draw_blocks(num, size, size // 6, size // 3, first=NEXT_BLOCK)
    windows = draw_blocks(num, size, size - 4 * size // 7, size - 3 * size // 7, first=1.0)
    outside = (draw_each(num, torch.rand) < outpaint_share)[:, None, None]
    hidden = torch.where(outside, ~windows, blocks)[:, None].to(x.device)
    noise = draw_each(num, lambda n: torch.rand(n, *x.shape[1:], device=x.device))
    return torch.where(hidden, noise, x)


def draw_blocks(num: int, size: int, least: int, most: int, first: float) -> Tensor:
    """Return unions of up to five random rectangles, bool (num, size, size), sides from `least` to `most` pixels.

    The first is there with probability `first`, each next one with 0.95 if the one before it is.
    """
    chance = torch.full((NUM_BLOCKS,), NEXT_BLOCK)
    chance[0] = first
    there = (draw_each(num, lambda n: torch.rand(n, NUM_BLOCKS)) < chance).cumprod(1).bool()
    side = draw_each(num, lambda n: torch.randint(max(1, least), max(1, most) + 1, (n, NUM_BLOCKS, 2)))
    start = (draw_each(num, lambda n: torch.rand(n, NUM_BLOCKS, 2)) * (size - side + 1)).long()
    line = torch.arange(size)
    inside = (line >= start[..., None]) & (line < (start + side)[..., None])
    rows, columns = inside.unbind(2)
    return (rows[..., None] & columns[:, :, None] & there[..., None, None]).any(1)

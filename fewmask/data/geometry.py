"""Batched geometry on the batch's own device: antialiased crops by matrix products, affine maps by one grid_sample.

The few numbers that describe a transform (a box, a 2x3 matrix) are drawn on the host from torch's global generator:
a seeded step gives the same crops and angles on a CPU and on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.draws import draw_each
from fewmask.types import UserError

NUM_ATTEMPTS = 10


def uniform(num: int, low: float, high: float) -> Tensor:
    """Return a float32 draw from [low, high) for each of `num` images, on the host."""
    return draw_each(num, lambda n: torch.empty(n).uniform_(low, high))


def check_range(name: str, bounds: tuple[float, float]) -> None:
    """Raise a UserError unless 0 < low <= high."""
    if not 0 < bounds[0] <= bounds[1]:
        raise UserError(f"'{name}' cannot be {tuple(bounds)}: give two numbers with 0 < first <= second.")


def check_area(name: str, bounds: tuple[float, float]) -> None:
    """Raise a UserError unless 0 < low <= high <= 1: shares of the image's area that a crop may have."""
    if not 0 < bounds[0] <= bounds[1] <= 1:
        raise UserError(
            f"'{name}' cannot be {tuple(bounds)}: give two shares of the image's area with 0 < first <= second <= 1."
        )


def whole_boxes(num: int) -> Tensor:
    """Return the boxes (num, 4) that cover the whole image (see `crop_resize`)."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(num, 1)


def random_boxes(num: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Return random boxes (num, 4) of area in `scale` (share of the image) and of width/height in `ratio`.

    The law of torchvision's RandomResizedCrop on a square image: uniform area, log-uniform ratio, ten attempts, then
    the whole image. Sides and positions are fractions, not rounded to pixels (our choice).
    """
    area = draw_each(num, lambda n: torch.empty(n, NUM_ATTEMPTS).uniform_(*scale))
    slant = (math.log(ratio[0]), math.log(ratio[1]))
    aspect = draw_each(num, lambda n: torch.empty(n, NUM_ATTEMPTS).uniform_(*slant)).exp_()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])
    fits = (sides <= 1).all(0)
    first = fits.int().argmax(1)
    side = torch.where(fits.any(1), sides[:, torch.arange(num), first], 1.0)
    start = draw_each(num, lambda n: torch.rand(2, n).T).T * (1 - side)
    return torch.stack([start[0], start[0] + side[0], start[1], start[1] + side[1]], 1)


def flip_boxes(boxes: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Return the boxes (b, 4) with their ends swapped where `horizontal` or `vertical` (b,) say so: a mirrored crop."""
    x = torch.where(horizontal[:, None], boxes[:, [1, 0]], boxes[:, :2])
    y = torch.where(vertical[:, None], boxes[:, [3, 2]], boxes[:, 2:])
    return torch.cat([x, y], 1)


def random_flips(num: int, flip: bool, vertical: bool) -> tuple[Tensor, Tensor]:
    """Return whether to mirror left-right and top-bottom, two bool (num,): each with probability 1/2 where allowed."""
    return (draw_each(num, torch.rand) < 0.5) & flip, (draw_each(num, torch.rand) < 0.5) & vertical


def interval_weights(start: Tensor, end: Tensor, num_in: int, num_out: int) -> Tensor:
    """Return the rows (b, num_out, num_in) that resample [start, end] (fractions of the axis; mirrored if end < start).

    The triangle filter of Pillow's BILINEAR, widened when shrinking so that it does not alias; rows sum to 1. Pixels
    just outside the interval take part (those outside the image do not), so a crop has no artificial border.
    """
    step = ((end - start) * (num_in / num_out))[:, None]
    centre = start[:, None] * num_in + step * (torch.arange(num_out, device=start.device) + 0.5)
    pixel = torch.arange(num_in, device=start.device) + 0.5
    distance = (pixel - centre[..., None]).abs_().div_(step.abs().clamp(min=1)[..., None])
    weights = distance.neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return the boxes of `x` (b, k, h, w) resized to (b, k, size, size) with antialiasing.

    `boxes` (b, 4) holds left, right, top, bottom as fractions of the sides; left > right mirrors. The filter is
    separable and differs per image, so it is two batched matrix products rather than a loop.
    """
    num, channels, height, width = x.shape
    left, right, top, bottom = boxes.to(x.device).unbind(1)
    columns = interval_weights(left, right, width, size)
    rows = interval_weights(top, bottom, height, size)
    narrow = torch.bmm(x.reshape(num, channels * height, width), columns.transpose(1, 2))
    return rows[:, None] @ narrow.view(num, channels, height, size)


def affine(angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """Return matrices (b, 2, 3) from output to input coordinates in [-1, 1], as `warp` takes them.

    `angle` and `shear` (b,) in degrees, `scale` (b,) > 1 enlarges, `shift` (b, 2) in fractions of the sides, `mirror`
    (b, 2) holds +1 or -1 per axis. The output is mirrored, sheared, shrunk, turned and shifted on its way to the input.
    """
    turn = torch.deg2rad(angle)
    cos, sin, slope = turn.cos(), turn.sin(), torch.deg2rad(shear).tan()
    linear = torch.stack([cos, cos * slope - sin, sin, sin * slope + cos], 1).view(-1, 2, 2)
    return torch.cat([linear * mirror[:, None] / scale[:, None, None], 2 * shift[..., None]], 2)


def warp(x: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Return `x` (b, k, h, w) sampled bilinearly through `matrices` (b, 2, 3) as (b, k, size, size).

    Outside the image it is mirrored at its edges (a mask therefore mirrors with its picture). No antialiasing: meant
    for steps up to about 1.4 input pixels per output pixel.
    """
    shape = [x.shape[0], x.shape[1], size, size]
    grid = F.affine_grid(matrices.to(x.device), shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

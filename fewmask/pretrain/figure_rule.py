"""Which part of a picture a threshold on its own colours sets apart: the rule that `figure` learns from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 48  # along each side of the small picture that is split
BINS = 64  # of the histogram that Otsu's threshold is sought in
LOWERED = (0.45, 0.1)  # of the way from the mean below the threshold to that above it: of small and of large figures,
SMALL_TO_LARGE = (0.03, 0.3)  # which cover these shares of the picture
SPREAD = 0.15  # standard deviation of the weights that make the middle, in sides of the picture
ABOUT = 0.5  # likewise of those by which what is far from the middle is fainter
BORDER = 4  # cells
RIM = 6  # cells along the border that tell how a picture is lit
FAINTEST = 4.0  # difference of colours, in grey levels, that is no noise
FITS = 3  # of the light to them, each by those that the one before fitted
STEEPEST = 100.0  # difference of colours, in grey levels, between the light of the middle and that of a side's middle
HAIR = 1 / 29  # of the side: dark things narrower than this are painted over


class FigureRule(NamedTuple):
    """When what a threshold splits off is a figure, in shares: of the picture, of its border, of its colours' variance.

    It covers at least `min_area` of the picture and at most `max_border` of its border, and the threshold explains at
    least `min_explained` of the variance along the line that it splits. The defaults were chosen on
    700 training images of ISIC-2017 and 300 of HAM10000 with their masks. On 300 others of each, in view when the
    last two limits were set, 85 and 89 % are told, with a Dice of .88 and .91. Who asks for more to be
    explained gets fewer and surer ones.
    """

    min_area: float = 0.01
    max_border: float = 0.25
    min_explained: float = 0.6


def find_figure(image: Tensor, rule: FigureRule) -> tuple[Tensor, Tensor]:
    """Return the figures bool (b, 1, 48, 48) of pictures uint8 (b, 3, h, w), and whether each is one: bool (b,).

    The cells' colours, each the mean of three by three, dark hairs painted over before and shading taken off after, are
    projected on the line from the border's median to the middle's mean, in which a cell weighs by how near it is to the
    middle (a Gaussian) and by how far its colour is from that median. Otsu's threshold splits the projections, each
    made fainter the farther it is from the middle, so that what is near the border does not decide. Between the means
    of the two parts a threshold is then put so that the soft margins of a large figure belong to it, and the blur
    around a small one does not. The figure is what is connected, on the side towards the middle, to the cell nearest to
    the middle. It is one if it is as `rule` says, the line is longer than noise makes it, and the light is not so steep
    that it must be a dark frame's. But for hairs, brighter or darker makes no difference.
    """
    with torch.autocast(image.device.type, enabled=False):  # the light's fit is not solved in half precision
        return _find_figure(image, rule)


def _find_figure(image: Tensor, rule: FigureRule) -> tuple[Tensor, Tensor]:
    cells = F.adaptive_avg_pool2d(without_hairs(image).float(), CELLS)
    cells, bend = without_shading(F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    weight, near = (about_the_middle(spread, image.device) for spread in (SPREAD, ABOUT))
    border = along_the_border(BORDER, image.device)
    edge = outermost(cells, BORDER).median(2).values[..., None, None]
    differs = (cells - edge).square().sum(1, keepdim=True).sqrt() * weight
    middle = (cells * differs).sum((2, 3), keepdim=True) / differs.sum((2, 3), keepdim=True).clamp_min(1e-6)
    along = ((cells - edge) * (middle - edge)).sum(1).flatten(1)
    above, explained = split_by_otsu(along * near.flatten())
    core = connected(above.view(-1, 1, CELLS, CELLS), weight).float().mean((1, 2, 3))
    figure = connected(lowered(along, above, lowering(core)).view(-1, 1, CELLS, CELLS), weight)
    area, on_border = figure.float().mean((1, 2, 3)), (figure * border).sum((1, 2, 3)) / border.sum()
    told = (area > 0) & (area >= rule.min_area) & (on_border <= rule.max_border) & (explained >= rule.min_explained)
    return figure, told & ((middle - edge).square().sum((1, 2, 3)) >= FAINTEST**2) & (bend <= STEEPEST)


def places(device: torch.device) -> Tensor:
    """Return where the cells are along a side (48,), from -0.5 to 0.5."""
    return torch.linspace(-0.5, 0.5, CELLS, device=device)


def about_the_middle(spread: float, device: torch.device) -> Tensor:
    """Return a Gaussian over the cells (48, 48), 1 in the middle, of a standard deviation in sides of the picture."""
    square = places(device).square()
    return torch.exp(-(square[:, None] + square) / (2 * spread**2))


def along_the_border(width: int, device: torch.device) -> Tensor:
    """Return 1 in the `width` outermost cells of each side and 0 in the others, (48, 48)."""
    border = torch.ones(CELLS, CELLS, device=device)
    border[width:-width, width:-width] = 0
    return border


def outermost(maps: Tensor, width: int) -> Tensor:
    """Return the values of maps (..., 48, 48) in the `width` outermost cells of each side, (..., m)."""
    sides = maps[..., width:-width, :width], maps[..., width:-width, -width:]
    return torch.cat([part.flatten(-2) for part in (maps[..., :width, :], maps[..., -width:, :], *sides)], dim=-1)


def without_shading(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return cells (b, 3, 48, 48) less the light that falls on them, uneven or fainter in the corners, and its bend.

    Each colour's light is a plane and a paraboloid about the middle, fitted to the cells along the border. Those that
    it fits badly, such as a sticker's or a lesion's that reaches the border, count for little in the next fit: Cauchy's
    weights, by the median distance, and in the first fit by that from the median colour. The bend (b,) is how far the
    paraboloid's colour in the middle is from that in the middle of a side, in grey levels.
    """
    place = places(cells.device)
    x, y = place.expand(CELLS, CELLS), place[:, None].expand(CELLS, CELLS)
    basis = torch.stack([torch.ones_like(x), x, y, x.square() + y.square()])
    known, colours = outermost(basis, RIM).T, outermost(cells, RIM).transpose(1, 2)
    fitted = colours.median(1, keepdim=True).values
    for _ in range(FITS):
        distance = (colours - fitted).square().sum(2, keepdim=True).sqrt()
        trust = 1 / (1 + (distance / distance.median(1, keepdim=True).values.clamp_min(1)).square())
        weighed = (known * trust).transpose(1, 2)
        normal = weighed @ known + 1e-3 * torch.eye(4, device=cells.device)
        light = torch.linalg.solve_ex(normal, weighed @ colours)[0]  # solve() waits for an accelerator
        fitted = known @ light
    bend = light[:, 3].square().sum(1).sqrt() / 4  # half a side from the middle the square is a quarter
    return cells - (light.transpose(1, 2) @ basis.flatten(1)).reshape(cells.shape), bend


def without_hairs(image: Tensor) -> Tensor:
    """Return pictures uint8 (b, 3, h, w) without their thin dark things, colour by colour: a closing by a square.

    Its side is the odd number of pixels nearest to a 29th of the longer side. By shifts, as a pooling takes thirty
    times as long on a CPU.
    """
    reach = round((max(image.shape[2:]) * HAIR - 1) / 2)
    return shifted(shifted(image, reach, torch.maximum), reach, torch.minimum)


def shifted(image: Tensor, reach: int, choose: Callable[..., Tensor]) -> Tensor:
    """Return what `choose`, a maximum or a minimum, leaves of all pixels within `reach` along both axes."""
    for axis in (2, 3):
        wide, size = image.clone(), image.shape[axis]
        for step in range(1, min(reach, size - 1) + 1):
            near, far = (wide.narrow(axis, start, size - step) for start in (0, step))
            choose(far, image.narrow(axis, 0, size - step), out=far)
            choose(near, image.narrow(axis, step, size - step), out=near)
        image = wide
    return image


def lowering(area: Tensor) -> Tensor:
    """Return how far a threshold is to lie from the mean below to that above, (b,), for figures of an area (b,).

    From 0.45 for those of 0.03 of the picture, and smaller ones, to 0.1 for those of 0.3 and larger ones, straight in
    the area's logarithm. Our choice, on the images that `FigureRule` tells of: Otsu's threshold, about the
    middle of that way, leaves a fifth of a large lesion out, and one threshold for all made small ones thrice their
    size.
    """
    small, large = (math.log(share) for share in SMALL_TO_LARGE)
    place = ((area.clamp_min(1e-4).log() - small) / (large - small)).clamp(0, 1)
    return LOWERED[0] + (LOWERED[1] - LOWERED[0]) * place


def lowered(values: Tensor, above: Tensor, part: Tensor) -> Tensor:
    """Return which of the values (b, n) lie above `part` (b,) of the way from the mean below to the mean above."""
    high, low = ((values * side).sum(1) / side.sum(1).clamp_min(1) for side in (above.float(), (~above).float()))
    return (values > (low + part * (high - low))[:, None]) & above.any(1, keepdim=True)


def connected(inside: Tensor, weight: Tensor) -> Tensor:
    """Return what of `inside` bool (b, 1, n, n) is connected to its cell of the largest weight (n, n), by 8 neighbours.

    In at most n steps: a winding thing may lose its end.
    """
    nearest = (inside * weight).flatten(1).argmax(1, keepdim=True)  # the first of several
    found = torch.zeros_like(inside).flatten(1).scatter_(1, nearest, True).view_as(inside) & inside
    for _ in range(inside.shape[-1]):  # by shifts of bool, in a quarter of the time of a pooling
        wide = found.clone()
        wide[..., 1:] |= found[..., :-1]
        wide[..., :-1] |= found[..., 1:]
        found = wide.clone()
        found[..., 1:, :] |= wide[..., :-1, :]
        found[..., :-1, :] |= wide[..., 1:, :]
        found &= inside
    return found


def split_by_otsu(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the values (b, n) lie above their row's threshold, and the share of variance it explains, (b,).

    The threshold (Otsu 1979, over 64 equal bins) divides a row so that the variance between its two parts is largest;
    a constant row has none above, and nothing explained. Not skimage's, which takes one picture at a time and on the
    host.
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    bins = ((values - low) / (high - low).clamp_min(1e-12) * (BINS - 1)).round().long()
    shares = torch.zeros(len(values), BINS, device=values.device)
    shares.scatter_add_(1, bins, torch.full_like(values, 1 / values.shape[1]))
    below, levels = shares.cumsum(1), torch.arange(BINS, device=values.device)
    mean = (shares * levels).cumsum(1)
    between = (mean[:, -1:] * below - mean).square() / (below * (1 - below)).clamp_min(1e-6)
    between[:, -1] = 0
    best, threshold = between.max(1)
    total = (shares * (levels - mean[:, -1:]).square()).sum(1)
    return bins > threshold[:, None], best / total.clamp_min(1e-6)

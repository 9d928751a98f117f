"""The augmentation of auxiliary tasks, as a set of kinds, so that a task can say which of them it cannot bear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewmask.data.augment import stack_mask
from fewmask.data.colour import Chain, ColourJitter, GaussianBlur, RandomGrayscale
from fewmask.data.geometry import check_area, crop_resize, flip_boxes, random_boxes, random_flips, whole_boxes
from fewmask.draws import rows_of_all
from fewmask.types import Batch

Kind = Literal["crop", "flip", "vertical_flip", "rotation", "colour"]

COLOUR = Chain((ColourJitter(0.4, 0.4, 0.2, 0.1, 0.8), RandomGrayscale(0.2), GaussianBlur((0.1, 2.0), 0.5)))
"""SimCLR's three changes of colour, with DINO's milder values: colour tells something about skin (ours)."""


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop, flips, quarter turns and colour: those that are among the `kinds`.

    "crop" takes a share of the area from `crop_scale`, width/height from `ratio`; "flip" mirrors left-right,
    "vertical_flip" top-bottom (leave it out for radiographs, which have an up); "rotation" turns by multiples of 90
    degrees, each as often; "colour" is jitter, grayscale and blur (`COLOUR`).
    """

    size: int
    kinds: frozenset[Kind]
    crop_scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_area("crop_scale", self.crop_scale)

    def move(self, batch: Batch, size: int | None = None) -> Tensor:
        """Return a raw batch's picture, and its mask, if any, as a fourth channel: float32 (b, 3 or 4, size, size).

        Values are in [0, 1]; colour is left to `colour`. `size` is the augmentation's own where it is not given.
        """
        x = stack_mask(batch)
        boxes = random_boxes(len(x), self.crop_scale, self.ratio) if "crop" in self.kinds else whole_boxes(len(x))
        flips = random_flips(len(x), "flip" in self.kinds, "vertical_flip" in self.kinds)
        x = crop_resize(x, flip_boxes(boxes, *flips), size or self.size).clamp_(0, 1)
        return turn_quarters(x, random_start(len(x)))[0] if "rotation" in self.kinds else x

    def colour(self, picture: Tensor) -> Tensor:
        """Return pictures (b, 3, s, s) in [0, 1] with another colour, where that is among the kinds."""
        return COLOUR(picture) if "colour" in self.kinds else picture


def turn_quarters(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return pictures (b, k, s, s), row i turned by (i + start) mod 4 quarters anticlockwise, and the turns int64 (b,).

    Every turn has its quarter of the batch: four slices, no loop over images.
    """
    turned = torch.empty_like(x)
    for offset in range(4):
        turned[offset::4] = torch.rot90(x[offset::4], (offset + start) % 4, (2, 3))
    return turned, (torch.arange(len(x), device=x.device) + start) % 4


def random_start(num: int) -> int:
    """Return which turn the first of `num` images gets, so that in a small batch, too, each turn is equally likely."""
    return (int(torch.randint(4, ())) + int(rows_of_all(num)[0][0])) % 4

"""Bring a student's features to the width and the resolution of the teacher's, level by level."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.distill.widths import Widths
from fewmask.types import SegOutput, UserError

NEAR = (4,)


class Pair(NamedTuple):
    """The places of two features that are compared, counted from the finest, 0."""

    student: int
    teacher: int


class Align(nn.Module):
    """A 1x1 convolution to the teacher's channels, then bilinear resizing to the teacher's map (FitNets' regressor).

    Resizing is ours, for networks whose strides differ; a finer map is reduced with antialiasing. Being linear, one per
    position and one over positions, the two could change places.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(num_in, num_out, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (b, num_out, *size) from (b, num_in, h, w)."""
        return resize(self.project(x), size)


class AlignLevels(nn.Module):
    """One `Align` for each chosen level of the teacher.

    `levels` are the teacher's, counted from the finest, 0; None is the one nearest to a stride of 4 (our choice: fine
    enough to show a boundary, and not yet the logits). The student's part is its feature of the nearest stride.
    """

    def __init__(self, student: Widths, teacher: Widths, levels: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.pairs = pair_levels(student, teacher, levels)
        self.channels = [teacher.channels[pair.teacher] for pair in self.pairs]
        self.aligns = nn.ModuleList(
            Align(student.channels[pair.student], channels)
            for pair, channels in zip(self.pairs, self.channels, strict=True)
        )

    def forward(self, student: SegOutput, teacher: SegOutput) -> list[tuple[Tensor, Tensor]]:
        """Return, for each level, the student's aligned feature and the teacher's, both (b, c, h, w)."""
        aligned = []
        for align, pair in zip(self.aligns, self.pairs, strict=True):
            target = teacher.features[pair.teacher]
            aligned.append((align(student.features[pair.student], map_size(target)), target))
        return aligned


def pair_levels(
    student: Widths, teacher: Widths, levels: tuple[int, ...] | None = None, near: tuple[int, ...] = NEAR
) -> list[Pair]:
    """Return which features are compared: the teacher's `levels`, or those nearest to the strides `near`.

    Each is paired with the student's feature of the nearest stride, on a logarithmic scale, the finer of two equally
    near. Raises UserError for a level the teacher does not have, or where a network returns no feature at all.
    """
    for name, widths in (("student", student), ("teacher", teacher)):
        if not widths.channels:
            raise UserError(f"The {name} returns no usable layer: choose a segmenter with features, or the loss 'kd'.")
    if levels is None:
        # Two strides may have the same nearest level: it is taken once.
        levels = tuple(dict.fromkeys(nearest_level(teacher, stride) for stride in near))
    wrong = [level for level in levels if not 0 <= level < len(teacher.channels)]
    if wrong or not levels or len(set(levels)) < len(levels):
        raise UserError(
            f"'levels' cannot be {list(levels)}: the teacher's usable layers are 0 to {len(teacher.channels) - 1}, at "
            f"strides {', '.join(map(str, teacher.strides))}; name at least one of them, each once."
        )
    return [Pair(nearest_level(student, teacher.strides[level]), level) for level in levels]


def nearest_level(widths: Widths, stride: int) -> int:
    """Return the place of the feature whose stride is nearest, on a logarithmic scale; the finer of two."""
    return min(range(len(widths.strides)), key=lambda level: abs(math.log2(widths.strides[level] / stride)))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (b, c, h, w) at another size, bilinear, with antialiasing where they get smaller."""
    if map_size(x) == size:
        return x
    smaller = size[0] < x.shape[2] or size[1] < x.shape[3]
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=smaller)


def map_size(x: Tensor) -> tuple[int, int]:
    """Return (h, w) of maps (b, c, h, w)."""
    return x.shape[2], x.shape[3]

"""Tiny segmenters and random outputs for the tests of distillation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput

SIZE = 16
STUDENT = Widths((4, 6, 3), (1, 2, 8))
TEACHER = Widths((5, 3, 4, 2), (1, 2, 4, 8))


class TinySegmenter(nn.Module):
    """One convolution a level at strides 1, 2 and 4, and a head over all levels; BatchNorm and dropout to have modes.

    The convolutions behind a BatchNorm have no bias: its gradient would be zero.
    """

    def __init__(self, width: int = 4, num_classes: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for num_in, num_out, stride in ((3, width, 1), (width, width + 1, 2), (width + 1, width + 2, 2)):
            self.levels.append(
                nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.SiLU())
            )
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Conv2d(3 * width + 3, num_classes, 1)

    def forward(self, image: torch.Tensor) -> SegOutput:
        features = []
        for level in self.levels:
            features.append(level(features[-1] if features else image))
        joined = [F.interpolate(f, image.shape[2:], mode="bilinear") for f in features]
        return SegOutput(self.head(self.dropout(torch.cat(joined, 1))), features)


def segmenter(width: int = 4, seed: int = 0, **settings) -> TinySegmenter:
    torch.manual_seed(seed)
    return TinySegmenter(width, **settings)


def random_output(widths: Widths, seed: int, num: int = 3, size: int = SIZE) -> SegOutput:
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(num, c, size // s, size // s, generator=generator)
        for c, s in zip(widths.channels, widths.strides, strict=True)
    ]
    return SegOutput(3 * torch.randn(num, 1, size, size, generator=generator), features)


def blobs(num: int = 3, size: int = SIZE) -> torch.Tensor:
    """Masks of growing squares, the first in the corner."""
    mask = torch.zeros(num, 1, size, size)
    for i in range(num):
        mask[i, :, 2 * i : 2 * i + size // 2, i : i + size // 2] = 1
    return mask


def batch_of(mask: torch.Tensor | None, num: int = 3, **extra: torch.Tensor) -> Batch:
    return Batch(torch.zeros(num, 3, SIZE, SIZE), [str(i) for i in range(num)], mask, extra=extra)


def raw_batch(num: int = 4, size: int = SIZE) -> Batch:
    """Dark squares on noise; the mask is the square."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(120, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(num, 1, size, size, dtype=torch.uint8)
    for i in range(num):
        mask[i, :, 1 + i : 9 + i, 4:12] = 255
    return Batch(torch.where(mask.bool(), 30, image).to(torch.uint8), [str(i) for i in range(num)], mask)


def identity_align(distiller: nn.Module) -> None:
    """Make every 1x1 convolution of a distiller the identity."""
    with torch.no_grad():
        for align in distiller.align.aligns:
            nn.init.dirac_(align.project.weight)
            align.project.bias.zero_()

"""A trunk of three convolutions and raw batches for the auxiliary tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.auxiliary import AUXILIARY, AuxiliaryTask
from fewmask.models import Encoder
from fewmask.registry import build
from fewmask.types import Batch

SIZE = 32


class TinyTrunk(Encoder):
    """Features at strides 2, 4 and 8; batch normalisation at the first two."""

    kind = "cnn"

    def __init__(self, size: int = SIZE, channels: tuple[int, ...] = (8, 16, 24)) -> None:
        super().__init__("tiny", size, {})
        self.channels, self.strides = channels, tuple(2 ** (i + 1) for i in range(len(channels)))
        widths = (3, *channels)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, channels, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels[:-1])

    def forward(self, image: Tensor) -> list[Tensor]:
        features, x = [], self.input_affine(image)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            x = F.relu(self.norms[i](x)) if i < len(self.norms) else x
            features.append(x)
        return features


def raw_batch(num: int = 4, side: int = 40, seed: int = 0) -> Batch:
    """Smooth pictures with a bright square each; the mask is the square."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 5, 5, generator=generator)
    image = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 200
    mask = torch.zeros(num, 1, side, side, dtype=torch.uint8)
    for i in range(num):
        top, left = torch.randint(side // 8, side // 2, (2,), generator=generator).tolist()
        mask[i, :, top : top + side // 3, left : left + side // 4] = 255
    image = torch.where(mask.bool(), image * 0.3 + 150, image)
    return Batch(image.to(torch.uint8), [str(i) for i in range(num)], mask)


def make(name: str, trunk: Encoder | None = None, **settings) -> tuple[AuxiliaryTask, Encoder]:
    torch.manual_seed(0)
    trunk = TinyTrunk() if trunk is None else trunk
    return build(AUXILIARY[name], settings, "method", encoder=trunk, size=trunk.size), trunk

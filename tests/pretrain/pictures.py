"""Small batches for the pre-training methods, raw as a loader yields them, and pictures of discs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fewmask.types import Batch

SIZE = 64
SIDE = 96  # of the pictures of discs
EMPTY = torch.zeros(SIDE, SIDE, dtype=torch.bool)
SMALL = {"num_prototypes": 12, "projector_hidden": 16, "projector_bottleneck": 8}


def raw_batch(num: int = 3, side: int = 72, seed: int = 0) -> Batch:
    """Smooth pictures with labels, and superpixels of nine squares."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 5, 5, generator=generator)
    image = (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    third = torch.arange(side) * 3 // side
    superpixels = (third[:, None] * 3 + third[None]).to(torch.uint8).expand(num, 1, -1, -1).contiguous()
    label = torch.arange(num) % 2
    return Batch(image, [str(i) for i in range(num)], label=label, extra={"superpixels": superpixels})


def views_of(subject, num: int = 3) -> Batch:
    """The batch a method's views make of the raw one, always the same."""
    torch.manual_seed(1)
    return subject.views()(raw_batch(num))


@torch.no_grad()
def set_apart(subject) -> None:
    """Make the teacher differ from the student, and the centre from zero."""
    for parameter in subject.teacher.parameters():
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    subject.centre.value.normal_(std=0.1)


def disc(middle=(48, 48), radius=24.0) -> torch.Tensor:
    """Return where a disc of pixels is: bool (SIDE, SIDE)."""
    place = torch.arange(SIDE) + 0.5
    return (place[:, None] - middle[0]).square() + (place - middle[1]).square() < radius**2


def painted(inside: torch.Tensor, figure=(90, 40, 30), ground=(220, 180, 170)) -> torch.Tensor:
    """Return pictures uint8 (1, 3, SIDE, SIDE) of two colours."""
    colours = torch.tensor([ground, figure], dtype=torch.uint8)
    return colours[inside.long()].permute(2, 0, 1)[None]

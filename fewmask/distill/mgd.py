"""MGD: the student's features, masked at random anywhere, must generate the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewmask.distill.align import AlignLevels
from fewmask.distill.bands import random_mask
from fewmask.distill.distiller import Distiller, check_share, squared_error
from fewmask.distill.generation import Generation
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput


class MGD(Distiller):
    """mean((T - G(M * align(S)))^2): masked generative distillation (Yang et al. 2022).

    M drops each position, for all channels, with probability `drop` (paper: 0.75 for segmentation); G is two 3x3
    convolutions. Ours: the mean over elements where the paper sums, which ties the weight to the feature's size;
    `levels` (see `AlignLevels`). Identical features do not make it zero: what is dropped has to be guessed. A `drop`
    outside [0, 1] raises a UserError.
    """

    def __init__(
        self, student: Widths, teacher: Widths, drop: float = 0.75, levels: tuple[int, ...] | None = None
    ) -> None:
        check_share("drop", drop)
        super().__init__()
        self.drop = drop
        self.align = AlignLevels(student, teacher, levels)
        self.pairs = self.align.pairs
        self.generations = nn.ModuleList(map(Generation, self.align.channels))

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,); the mask is drawn from torch's global generator."""
        each = []
        for generate, (own, wanted) in zip(self.generations, self.align(student, teacher), strict=True):
            dropped = random_mask(torch.ones_like(own[:, :1]), self.drop)
            each.append(squared_error(generate(own.masked_fill(dropped, 0.0)), wanted))
        return torch.stack(each).mean(0)

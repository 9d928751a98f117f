"""CWD: each channel is a distribution over the positions of the image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewmask.distill.align import AlignLevels
from fewmask.distill.distiller import Distiller, check_temperature
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput


class CWD(Distiller):
    """T^2 / C sum_c KL(softmax(T_c / T) || softmax(S_c / T)), softmax over positions (Shu et al. 2021).

    T = 4. `on` chooses what is compared, as the paper does: "logits" (weight 3 there) or "features" (a 1x1
    convolution to the teacher's width, mean over `levels`, see `AlignLevels`). With our one logit C = 1. The softmax
    is blind to a constant added to a channel; it is zero for identical maps. A temperature of zero or less raises a
    UserError.
    """

    def __init__(
        self,
        student: Widths,
        teacher: Widths,
        on: Literal["logits", "features"] = "logits",
        temperature: float = 4.0,
        levels: tuple[int, ...] | None = None,
    ) -> None:
        check_temperature(temperature)
        super().__init__()
        self.temperature = temperature
        self.align = AlignLevels(student, teacher, levels) if on == "features" else None
        self.pairs = self.align.pairs if self.align is not None else ()

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        compared = [(student.logits, teacher.logits)] if self.align is None else self.align(student, teacher)
        return torch.stack([channel_divergence(s, t, self.temperature) for s, t in compared]).mean(0)


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the mean over channels of KL(teacher || student) over positions, (b,), from (b, c, h, w)."""
    own = (student.flatten(2) / temperature).log_softmax(2)
    wanted = (teacher.flatten(2) / temperature).log_softmax(2)
    return temperature**2 * (wanted.exp() * (wanted - own)).sum(2).mean(1)

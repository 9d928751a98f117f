"""FitNet: the student's features are the teacher's, after a linear map."""

from __future__ import annotations

import torch
from torch import Tensor

from fewmask.distill.align import AlignLevels
from fewmask.distill.distiller import Distiller, squared_error
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput


class FitNet(Distiller):
    """Mean of (T - align(S))^2 over channels and positions: hints (FitNets, Romero et al. 2015, eq. 3).

    Paper: half the squared norm, a convolutional regressor, one hint layer in a first stage of its own. Ours: the mean,
    which does not tie the weight to the feature's size; the regressor is a 1x1 convolution (`Align`); the hint is one
    more loss of the only stage; the mean over `levels` (see `AlignLevels`). Zero where align(S) = T.
    """

    def __init__(self, student: Widths, teacher: Widths, levels: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.align = AlignLevels(student, teacher, levels)
        self.pairs = self.align.pairs

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,)."""
        return torch.stack([squared_error(*pair) for pair in self.align(student, teacher)]).mean(0)

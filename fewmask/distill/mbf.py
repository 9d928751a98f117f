"""MBF: the student's features, masked around the lesion's boundary, must generate the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewmask.distill.align import AlignLevels, map_size
from fewmask.distill.bands import BandMasking, RegionName, random_mask
from fewmask.distill.distiller import Distiller, mask_of, squared_error
from fewmask.distill.generation import Generation
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput


class MBF(Distiller):
    """mean((T - G(M * align(S)))^2), M dropping positions around the lesion's periphery (boundary distillation, 2024).

    Paper (abstract only): random masking around the periphery, and the student must reproduce the teacher's features.
    Ours, all else: the band is dilate(y, r) - erode(y, r) of the label (or of the teacher's prediction where there is
    none), r = `width` times the side, max-pooled to the feature's size; each of its positions is dropped with
    probability `drop`, all channels at once, and everything else is kept; G and the 1x1 convolution as in MGD; the mean
    over the whole map, and over `levels` (see `AlignLevels`). `region` is "boundary" or a control (`BandMasking`).
    Identical features do not make it zero: what is dropped has to be guessed. Without a boundary nothing is dropped.
    """

    def __init__(
        self,
        student: Widths,
        teacher: Widths,
        width: float = 0.03,
        drop: float = 0.5,
        region: RegionName = "boundary",
        levels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.masking = BandMasking(width, drop, region)
        self.align = AlignLevels(student, teacher, levels)
        self.pairs = self.align.pairs
        self.generations = nn.ModuleList(map(Generation, self.align.channels))

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,); the masks are drawn from torch's global generator."""
        mask, each = mask_of(batch), []
        for generate, (own, wanted) in zip(self.generations, self.align(student, teacher), strict=True):
            dropped = random_mask(*self.masking(mask, map_size(own)))
            each.append(squared_error(generate(own.masked_fill(dropped, 0.0)), wanted))
        return torch.stack(each).mean(0)

"""M2BF: several MBF heads, one after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from fewmask.distill.align import AlignLevels, map_size
from fewmask.distill.bands import BandMasking, RegionName, random_mask
from fewmask.distill.distiller import Distiller, mask_of, squared_error
from fewmask.distill.generation import Generation
from fewmask.distill.widths import Widths
from fewmask.types import Batch, SegOutput, UserError


class M2BF(Distiller):
    """sum_k mean((T - x_k)^2), x_k = G_k(M_k * x_{k-1}), x_0 = align(S): heads of MBF in cascade (2024).

    Paper (abstract only): a cascaded combination of MBF modules with several heads. Ours: three heads, every M_k a
    fresh draw from the same band, the losses added; `form` = "parallel" gives each head its own mask of x_0 instead.
    Everything else as in `MBF`; with one head both forms are MBF. Raises UserError for less than one head.
    """

    def __init__(
        self,
        student: Widths,
        teacher: Widths,
        num_heads: int = 3,
        form: Literal["cascade", "parallel"] = "cascade",
        width: float = 0.03,
        drop: float = 0.5,
        region: RegionName = "boundary",
        levels: tuple[int, ...] | None = None,
    ) -> None:
        if num_heads < 1:
            raise UserError(f"'num_heads' cannot be {num_heads}: give a whole number of at least 1, such as 3.")
        super().__init__()
        self.form = form
        self.masking = BandMasking(width, drop, region)
        self.align = AlignLevels(student, teacher, levels)
        self.pairs = self.align.pairs
        self.heads = nn.ModuleList(
            nn.ModuleList(Generation(channels) for _ in range(num_heads)) for channels in self.align.channels
        )

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,); the masks are drawn from torch's global generator."""
        mask, each = mask_of(batch), []
        for heads, (own, wanted) in zip(self.heads, self.align(student, teacher), strict=True):
            assert isinstance(heads, nn.ModuleList)
            guesses = self.generate(own, heads, *self.masking(mask, map_size(own)))
            each.append(torch.stack([squared_error(guess, wanted) for guess in guesses]).sum(0))
        return torch.stack(each).mean(0)

    def generate(self, x: Tensor, heads: Iterable[nn.Module], region: Tensor, share: Tensor) -> list[Tensor]:
        """Return what each head makes of the student's aligned feature (b, c, h, w)."""
        guesses: list[Tensor] = []
        for head in heads:
            source = guesses[-1] if guesses and self.form == "cascade" else x
            guesses.append(head(source.masked_fill(random_mask(region, share), 0.0)))
        return guesses

"""Which patches of an image are hidden: exactly as many in every image, so that a batch stays a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewmask.draws import draw_each
from fewmask.types import Batch, UserError


class Masking(ABC):
    """A strategy that hides the same number of patches in every image of a batch."""

    num_patches: int
    num_masked: int

    @abstractmethod
    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Return a boolean mask (b, num_patches), true where hidden, with `num_masked` true in every row."""


class RandomMask(Masking):
    """Hide patches anywhere, each choice equally likely (MAE, He et al. 2022, section 3).

    The share is rounded to the nearest whole number of patches. Raises UserError when that hides none or all.
    """

    def __init__(self, num_patches: int, ratio: float) -> None:
        self.num_patches = num_patches
        self.num_masked = round(num_patches * ratio)
        if not 0 < self.num_masked < num_patches:
            left = "nothing masked" if self.num_masked <= 0 else "nothing visible"
            raise UserError(
                f"A mask ratio of {ratio} leaves {left} of the {num_patches} patches of an image: choose a ratio "
                "between 0 and 1, or a larger image size."
            )

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Return a boolean mask (b, num_patches), true where hidden."""
        device = batch.image.device if generator is None else generator.device
        noise = draw_each(
            len(batch.image), lambda n: torch.rand(n, self.num_patches, device=device, generator=generator)
        )
        order = noise.argsort(dim=1)[:, : self.num_masked].to(batch.image.device)
        mask = torch.zeros(noise.shape, dtype=torch.bool, device=batch.image.device)
        return mask.scatter_(1, order, True)


def split_indices(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the visible (b, n - m) and of the masked patches (b, m), each rising.

    `num_masked` is given rather than counted, so that no value has to come back from the device.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - num_masked
    return order[:, :num_visible], order[:, num_visible:]

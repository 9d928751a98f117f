"""The one contract between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fewmask.types import Batch, Views

OtherImages = Literal["none", "all", "labelled"]


def identity(batch: Batch) -> Batch:
    """Return the batch as it is."""
    return batch


class Objective(nn.Module, ABC):
    """Something to be minimised, and what is kept of it afterwards.

    `needs_labels` says that images without a class label are of no use to it, `needs_masks` those without a mask.
    `min_batch` is the least number of images in a batch of all processes: 2 where images are compared.
    """

    needs_labels: bool = False
    needs_masks: bool = False
    min_batch: int = 1

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", a finite scalar to minimise, and the scalar terms to log."""

    @abstractmethod
    def product(self) -> nn.Module:
        """Return what is kept: an encoder or a segmenter."""

    def views(self) -> Views:
        """Return the augmentation from a raw batch to a normalised one.

        What it draws, and `forward`, comes from torch's global generator by `draws.draw_each`, for each image.
        """
        return identity

    def maps(self) -> Mapping[str, Any]:
        """Return how to make what `Batch.extra` must hold of each image, by name: "superpixels" -> a `Slic`."""
        return {}

    @property
    def other_images(self) -> OtherImages:
        """Which images `Batch.other` must hold beside each batch."""
        return "none"

    def before_step(self, progress: float) -> None:
        """Change the gradients before they are clipped and used; `progress` as below."""

    def after_step(self, progress: float) -> None:
        """Update what is not learnt by gradient (EMA and the like); `progress` runs from 0 to 1 over the training."""

    def at_end(self) -> None:
        """Raise a UserError where what was learnt is of no use; called once, after the last step."""

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return named pictures (b, 3, s, s) in [0, 1] for the report, from a batch that went through the views."""
        return {}

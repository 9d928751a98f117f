"""Boundary distance: how far is each place from the lesion's border, and on which side?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.auxiliary.augmentation import Kind
from fewmask.auxiliary.dense_head import DenseHead
from fewmask.auxiliary.distance import signed_distance
from fewmask.auxiliary.task import AuxiliaryTask
from fewmask.data.preprocess import denormalise, normalise
from fewmask.models import Encoder
from fewmask.types import Batch, UserError

STRIDE = 4
LEAST_COVER = 1 / 32
"""Half a pixel of a cell of 4 x 4: what a lesion beside the crop leaves in it by resampling is less."""


class BoundaryDistance(AuxiliaryTask):
    """Predict the signed distance to the border of the mask, negative inside, at stride 4, by L1.

    Two-stage method (arXiv 2402.07119, abstract only): five tasks of different properties; that one of them is a
    distance map derived from the labels is ours, and so is all that follows. The distance is exact on the cells of
    stride 4, in units of `radius` (a share of the picture's side), and cut at -1 and 1, so that only the surroundings
    of the border count. A cell is inside where half of it is, or, for a lesion too small for that, half of the
    largest cover. An empty mask is 1 everywhere and a full one -1. `DenseHead` predicts the map.

    Raises UserError for a radius outside (0, 1], and for a batch without masks.
    """

    name = "boundary_distance"
    property_ = "geometry"
    needs_masks = True

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        radius: float = 0.1,
        augment: tuple[Kind, ...] = ("crop", "flip", "vertical_flip", "rotation", "colour"),
        crop_scale: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        if not 0 < radius <= 1:
            raise UserError(f"'radius' cannot be {radius}: give a share of the picture's side above 0, such as 0.1.")
        super().__init__(size, augment, crop_scale)
        self.radius = radius
        self.head = DenseHead(encoder, num_channels=1, stride=STRIDE)

    def see(self, batch: Batch) -> Batch:
        """Return the augmented pictures and masks, `extra["distance"]` (b, 1, s / 4, s / 4) in [-1, 1] the target."""
        if batch.mask is None:
            raise UserError(
                "The task 'boundary_distance' needs a mask for every image: give it labelled images, or choose a task "
                "that learns from images alone."
            )
        x = self.augmentation.move(batch)
        mask = x[:, 3:].contiguous()
        extra = {"distance": distance_map(mask, self.radius)}
        return replace(batch, image=normalise(self.augmentation.colour(x[:, :3])), mask=mask, extra=extra)

    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the mean absolute error in units of the radius."""
        return {"loss": F.l1_loss(self.head(trunk(batch.image)).float(), batch.extra["distance"])}

    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "distance", strips (b, 3, s, 3 s): the picture, the map, and the predicted map; black is inside."""
        maps = [batch.extra["distance"], self.head(trunk(batch.image)).float()]
        grey = [F.interpolate(m.clamp(-1, 1), scale_factor=STRIDE).add(1).div(2).expand(-1, 3, -1, -1) for m in maps]
        return {"distance": torch.cat([denormalise(batch.image), *grey], dim=3)}


def distance_map(mask: Tensor, radius: float) -> Tensor:
    """Return the target (b, 1, s / 4, s / 4) in [-1, 1] for masks (b, 1, s, s) in [0, 1]; see `BoundaryDistance`."""
    cover = F.avg_pool2d(mask, STRIDE)[:, 0]
    inside = (cover >= cover.amax((1, 2), keepdim=True) / 2) & (cover >= LEAST_COVER)
    return (signed_distance(inside) / (radius * cover.shape[-1])).clamp_(-1, 1)[:, None]

"""Contrastive learning: which two views show the same image?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.auxiliary.augmentation import Kind
from fewmask.auxiliary.task import AuxiliaryTask
from fewmask.data.preprocess import denormalise, normalise
from fewmask.models import Encoder
from fewmask.types import Batch, UserError


class Contrastive(AuxiliaryTask):
    """SimCLR (Chen et al. 2020): find an image's other view among all views of the batch; NT-Xent, eq. 1.

    Paper: two random crops with flip, jittered colour, grayscale and blur; a projector of two layers, as wide as the
    feature, then 128; temperature 0.1. Two-stage method (abstract only): contrastive learning as one of its five tasks.
    Ours: the crop's area from 0.2 (paper: 0.08), milder colour, top-bottom flips. With several processes, each
    compares its own images only.

    Raises UserError for a temperature or width that is not above zero and, when called, for a batch of one image.
    """

    name = "contrastive"
    property_ = "instance"
    min_batch = 2

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        temperature: float = 0.1,
        projector_dim: int = 128,
        augment: tuple[Kind, ...] = ("crop", "flip", "vertical_flip", "colour"),
        crop_scale: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        if temperature <= 0:
            raise UserError(f"'temperature' cannot be {temperature}: give a number above zero, such as 0.1.")
        if projector_dim < 1:
            raise UserError(f"'projector_dim' cannot be {projector_dim}: give a width of at least 1.")
        super().__init__(size, augment, crop_scale)
        self.temperature = temperature
        width = encoder.channels[-1]
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projector_dim))

    def see(self, batch: Batch) -> Batch:
        """Return one view of each image, `extra["second"]` (b, 3, s, s) another."""
        views = [self.augmentation.colour(self.augmentation.move(replace(batch, mask=None))) for _ in range(2)]
        return replace(batch, image=normalise(views[0]), mask=None, extra={"second": normalise(views[1])})

    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and "accuracy", the share of views whose nearest other view is that of the same image."""
        if len(batch.image) < 2:
            raise UserError(
                "The task 'contrastive' compares images, and got a batch of one: raise the batch size to at "
                "least two for each process."
            )
        features = trunk.global_feature(torch.cat([batch.image, batch.extra["second"]]))
        similarity, partner = similarities(self.projector(features), self.temperature)
        return {
            "loss": F.cross_entropy(similarity, partner),
            "accuracy": (similarity.argmax(1) == partner).float().mean(),
        }

    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "views", the two views side by side."""
        return {"views": torch.cat([denormalise(batch.image), denormalise(batch.extra["second"])], dim=3)}


def similarities(projected: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return cosine / temperature between all views, float32 (2 b, 2 b), and the number of each one's partner (2 b,).

    `projected` (2 b, d) holds the first views and then the second ones. A view is not compared with itself: -inf.
    """
    # Half precision would leave cosines apart by less than 1/256 equal, and the temperature widens that tenfold.
    with torch.autocast(projected.device.type, enabled=False):
        unit = F.normalize(projected.float(), dim=1)
        cosine = unit @ unit.T
    itself = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    partner = torch.arange(len(cosine), device=cosine.device).roll(len(cosine) // 2)
    return (cosine / temperature).masked_fill(itself, -torch.inf), partner

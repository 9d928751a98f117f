"""Restoration: what did the picture look like before it was spoilt?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.auxiliary.augmentation import Kind
from fewmask.auxiliary.corruption import Corruption
from fewmask.auxiliary.dense_head import DenseHead
from fewmask.auxiliary.task import AuxiliaryTask
from fewmask.data.preprocess import denormalise, normalise
from fewmask.models import Encoder
from fewmask.types import Batch


class Restoration(AuxiliaryTask):
    """Restore a picture whose intensities, texture or parts were changed (Models Genesis, Zhou et al. 2019), by L2.

    Paper: a curve of intensities with probability 0.9, locally shuffled pixels 0.5, and in-painting or out-painting
    0.9, of which out-painting is a fifth (code); the loss is the mean over all pixels. Two-stage method (abstract
    only): restoration as one of its five tasks. Ours: the light decoder `DenseHead` where the paper trains a whole
    U-Net, so that one head serves every encoder; the loss on the normalised picture; the picture's three channels
    share a curve and a shuffle. The settings are the four probabilities; see `Corruption`.

    Colour is in conflict: the picture's own colour is what has to be restored. Raises UserError for a probability
    outside [0, 1].
    """

    name = "restoration"
    property_ = "appearance"
    conflicts = frozenset({"colour"})

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        curve: float = 0.9,
        shuffle: float = 0.5,
        paint: float = 0.9,
        outpaint_share: float = 0.2,
        augment: tuple[Kind, ...] = ("crop", "flip", "vertical_flip"),
        crop_scale: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        super().__init__(size, augment, crop_scale)
        self.corruption = Corruption(curve, shuffle, paint, outpaint_share)
        self.head = DenseHead(encoder, num_channels=3, stride=1)

    def see(self, batch: Batch) -> Batch:
        """Return the spoilt pictures, `extra["clean"]` (b, 3, s, s) the clean ones, both normalised."""
        clean = self.augmentation.move(replace(batch, mask=None))
        extra = {"clean": normalise(clean)}
        return replace(batch, image=normalise(self.corruption(clean)), mask=None, extra=extra)

    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the mean squared error over all pixels."""
        return {"loss": F.mse_loss(self.head(trunk(batch.image)).float(), batch.extra["clean"])}

    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "restoration", strips (b, 3, s, 3 s) of the clean, the spoilt and the restored picture."""
        shown = [batch.extra["clean"], batch.image, self.head(trunk(batch.image))]
        return {"restoration": torch.cat([denormalise(x) for x in shown], dim=3)}

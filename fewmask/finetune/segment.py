"""Fine-tuning of a segmenter on the images that have a mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.augment import Augment, segment_views
from fewmask.data.preprocess import denormalise
from fewmask.losses import cross_entropy_dice
from fewmask.models.average import AveragedObjective
from fewmask.types import Batch, UserError, Views

CONTOUR = (1.0, 0.9, 0.0)


class Segment(AveragedObjective):
    """Supervised segmentation: (1 - w) cross-entropy + w Dice (TransUNet: w = 0.5).

    `average` > 0 is the decay of a running average of the weights, which then is the product (see `WeightAverage`).
    `freeze_encoder` keeps `segmenter.encoder` as it is: no gradient, and eval mode throughout, so that neither its
    BatchNorm statistics nor dropout move. `augment` is "full" (flips, affine maps, colour: dermoscopy and photographs),
    "xray" (upright, gray), "flips" or "none"; see `fewmask.data.augment`. Values outside [0, 1] (`average`: [0, 1)), or
    a segmenter without an encoder to freeze, raise a UserError.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        *,
        size: int,
        dice_weight: float = 0.5,
        average: float = 0.0,
        freeze_encoder: bool = False,
        augment: Augment = "full",
    ) -> None:
        if not 0 <= dice_weight <= 1:
            raise UserError(f"'dice_weight' cannot be {dice_weight}: give a share between 0 and 1.")
        super().__init__(segmenter, average)
        self.size, self.dice_weight, self.augment = size, dice_weight, augment
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            _encoder_of(segmenter).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Segment:
        """Set the mode of everything but a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            _encoder_of(self.segmenter).eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and its terms "cross_entropy" and "dice_loss" (1 - soft Dice) for a batch with masks."""
        if batch.mask is None:
            raise UserError("Fine-tuning needs a mask for every image of the batch; pre-train on images without one.")
        logits = self.segmenter(batch.image).logits.float()
        return cross_entropy_dice(logits, batch.mask, self.dice_weight)

    def views(self) -> Views:
        """Return the augmentation that `augment` names."""
        return segment_views(self.augment, self.size)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"augmented"}: what the network sees, with the outline of its mask."""
        picture = denormalise(batch.image)
        return {"augmented": picture if batch.mask is None else draw_outline(picture, batch.mask)}


def _encoder_of(segmenter: nn.Module) -> nn.Module:
    encoder = getattr(segmenter, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise UserError("This segmenter has no encoder of its own to freeze; leave 'freeze_encoder' out.")
    return encoder


def draw_outline(picture: Tensor, mask: Tensor) -> Tensor:
    """Return `picture` (b, 3, h, w) in [0, 1] with the inner border of `mask` (b, 1, h, w) >= 0.5 in yellow.

    The border is one pixel wide (8-neighbourhood); the edge of the picture is no border.
    """
    inside = (mask >= 0.5).float()
    # A pixel is inside the eroded mask when no neighbour is outside; max_pool pads with -inf, so the edge is neutral.
    near_outside = F.max_pool2d(1 - inside, 3, stride=1, padding=1)
    colour = torch.tensor(CONTOUR, device=picture.device, dtype=picture.dtype).view(3, 1, 1)
    return torch.where((inside * near_outside).bool(), colour, picture)

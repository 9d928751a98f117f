"""Losses that more than one method needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F


def soft_dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Return 1 - Dice of the probabilities, mean over the batch (our choice: per image, so small lesions count alike).

    `logits` and `target` are (b, 1, h, w), target in [0, 1]; two empty masks cost 0 thanks to `smooth`. TransUNet's
    code squares both terms below, adds up the batch, and has the background for a class of its own.
    """
    probability = logits.sigmoid().flatten(1)
    target = target.flatten(1)
    overlap = (probability * target).sum(1)
    return (1 - (2 * overlap + smooth) / (probability.sum(1) + target.sum(1) + smooth)).mean()


def cross_entropy_dice(logits: Tensor, target: Tensor, dice_weight: float = 0.5) -> dict[str, Tensor]:
    """Return {"loss", "cross_entropy", "dice_loss"} with loss = (1 - w) CE + w Dice (TransUNet: w = 0.5)."""
    logits = logits.float()  # under mixed precision, sums over an image do not fit into half precision
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target)
    dice = soft_dice(logits, target)
    return {
        "loss": torch.lerp(cross_entropy, dice, dice_weight),
        "cross_entropy": cross_entropy.detach(),
        "dice_loss": dice.detach(),
    }


def loss_of_each(logits: Tensor, target: Tensor, dice_weight: float = 0.5) -> Tensor:
    """Return (1 - w) cross-entropy + w Dice of each image, (b,), from (b, 1, s, s); see `cross_entropy_dice`."""
    return vmap(lambda z, y: cross_entropy_dice(z[None], y[None], dice_weight)["loss"])(logits, target)

"""A running average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fewmask.objective import Objective
from fewmask.types import UserError


class WeightAverage(nn.Module):
    """A copy of a model whose weights are the exponential moving average of the model's.

    After update t = 0, 1, ...: average = d_t average + (1 - d_t) weights with d_t = min(decay, (1 + t) / (10 + t)), the
    warm-up of TensorFlow's ExponentialMovingAverage, so that a short training is not held back by its start. Buffers
    are copied, not averaged: BatchNorm's are running averages already (ours). The copy takes no gradient and stays in
    eval mode; it and the count of updates are in the state dict.
    """

    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.train(False)

    def train(self, mode: bool = True) -> WeightAverage:
        """Leave the copy in eval mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights; the two must be of one architecture."""
        count = self.num_updates
        # The count stays a tensor: reading it on the host would make an accelerator wait at every step.
        weight = 1 - ((1 + count) / (10 + count)).clamp(max=self.decay)
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current.to(average.dtype), weight)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        count.add_(1)


class AveragedObjective(Objective):
    """An objective that trains a segmenter and keeps it, or the running average of its weights if `average` > 0.

    `average` is the decay (see `WeightAverage`). Raises UserError unless it is in [0, 1).
    """

    def __init__(self, segmenter: nn.Module, average: float) -> None:
        if not 0 <= average < 1:
            raise UserError(f"'average' cannot be {average}: give a decay of at least 0 and below 1, such as 0.99.")
        super().__init__()
        self.segmenter = segmenter
        self.averaged = WeightAverage(segmenter, average) if average > 0 else None

    def product(self) -> nn.Module:
        """Return the segmenter, its weights averaged if `average` > 0."""
        return self.segmenter if self.averaged is None else self.averaged.model

    def after_step(self, progress: float) -> None:
        """Update the averaged weights."""
        if self.averaged is not None:
            self.averaged.update(self.segmenter)

"""What every distillation loss is: a comparison of two outputs, image by image, weighted by confidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewmask.distill.align import Pair
from fewmask.types import Batch, SegOutput, UserError


class Distiller(nn.Module, ABC):
    """Compare what a student and a teacher return; `forward` gives sum_i c_i l_i / b over the images (our choice).

    c is `batch.extra["confidence"]` (b,) in [0, 1], 1 where there is none: an image without a label weighs as much as
    its teacher is sure of it. l is `per_image`. Everything is float32 whatever precision the networks run in, and no
    gradient reaches the teacher. The constructor of a subclass takes `student` and `teacher` (`Widths`) and then its
    settings, and sets `pairs`: the features it compares, none where it looks at the logits alone.
    """

    pairs: Sequence[Pair] = ()

    def forward(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss, a float32 scalar."""
        with torch.autocast(student.logits.device.type, enabled=False):
            each = self.per_image(in_full(student), without_gradient(in_full(teacher)), batch)
        confidence = batch.extra.get("confidence")
        return each.mean() if confidence is None else (confidence.detach().float() * each).mean()

    @abstractmethod
    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Tensor:
        """Return the loss of each image, (b,), from float32 outputs."""


def in_full(output: SegOutput) -> SegOutput:
    """Return an output in float32."""
    return SegOutput(output.logits.float(), [feature.float() for feature in output.features])


def without_gradient(output: SegOutput) -> SegOutput:
    """Return an output cut from its graph."""
    return SegOutput(output.logits.detach(), [feature.detach() for feature in output.features])


def mask_of(batch: Batch) -> Tensor:
    """Return the mask float32 (b, 1, s, s), or raise a UserError when there is none."""
    if batch.mask is None:
        raise UserError("This distillation loss looks at regions of the mask: give every image a mask or a prediction.")
    return batch.mask.float()


def squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared difference over all but the first dimension, (b,)."""
    return (first - second).square().flatten(1).mean(1)


def check_temperature(temperature: float) -> None:
    """Raise a UserError unless the temperature is above zero."""
    if temperature <= 0:
        raise UserError(f"'temperature' cannot be {temperature}: give a number above zero, such as 4.")


def check_share(name: str, value: float) -> None:
    """Raise a UserError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"'{name}' cannot be {value}: give a share between 0 and 1.")

"""An auxiliary task as a pre-training method: the second of the two modes a task can be used in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from fewmask.auxiliary import AuxiliaryTask
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.types import Batch, Views


class Auxiliary(Objective):
    """Train an encoder on one auxiliary task; the task's head is thrown away.

    Two-stage method (arXiv 2402.07119, abstract only): in *pre-training* mode the task comes first and segmentation
    after it; `finetune.joint` is the other mode. The views are of the size the encoder was built for.
    """

    def __init__(self, encoder: Encoder, task: AuxiliaryTask) -> None:
        super().__init__()
        self.encoder, self.task = encoder, task
        self.needs_masks, self.min_batch = task.needs_masks, task.min_batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and the task's terms."""
        return self.task(self.encoder, batch)

    def product(self) -> Encoder:
        """Return the encoder."""
        return self.encoder

    def views(self) -> Views:
        """Return the task's views."""
        return self.task.views()

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return the task's pictures."""
        return self.task.preview(self.encoder, batch)


def pretrainer(task: type[AuxiliaryTask]) -> Callable[..., Auxiliary]:
    """Return what builds the objective of a task from an encoder and the task's own settings.

    Its signature is that of the task without the size, which is the encoder's: so a recipe's `method.KEY` is
    checked against the task itself, and the entry of the table looks like any other method.
    """

    def build(encoder: Encoder, **settings: Any) -> Auxiliary:
        make: Callable[..., AuxiliaryTask] = task
        return Auxiliary(encoder, make(encoder, encoder.size, **settings))

    signature = inspect.signature(task)
    parameters = [p for name, p in signature.parameters.items() if name != "size"]
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    build.__annotations__ = get_type_hints(task.__init__)
    return build

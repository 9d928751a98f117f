"""Joint training: segmentation and auxiliary tasks on one trunk, each with its own head and its own images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewmask.auxiliary import AUXILIARY, AuxiliaryTask
from fewmask.data.augment import Augment
from fewmask.draws import drawing_for
from fewmask.finetune.gradient_surgery import surgery_loss
from fewmask.finetune.segment import Segment
from fewmask.models import Encoder
from fewmask.objective import Objective
from fewmask.registry import build, choose
from fewmask.types import Batch, UserError, Views

WHERE = "finetune.method.task_settings"


class Joint(Objective):
    """Segmentation with one or several auxiliary tasks: L = L_seg + lambda * sum of L_i.

    Two-stage method (arXiv 2402.07119, abstract only): in *joint* mode the tasks share the trunk and have heads of
    their own, and each takes a batch of its own; L_seg + lambda_i L_i. The trunk is `segmenter.encoder`: one pass for
    the labelled batch, one for each task, and so statistics of its own for each pass's batch normalisation.

    Ours: lambda (`task_weight`) 0.3, to be chosen from 0.1, 0.3 and 1; the running statistics, which the segmenter uses
    once it is trained, are those of the labelled batches alone, since a task's pictures may be turned, shuffled or
    spoilt. Several tasks (`task` a list) share lambda and split `Batch.other` evenly, in their order: the uniform
    multi-task baseline. `combine` "pcgrad" replaces the gradient of the sum, in the trunk, by gradient surgery (Yu et
    al. 2020; see `surgery_loss`): another baseline. `task_settings` are the task's settings; for a list of tasks, a
    table of settings by name of task. The rest as `Segment`. With lambda = 0 nothing of a task is drawn, run or
    trained: `Segment`, bit for bit.

    `other_images` says what `Batch.other` must hold: "none", "all" (any image) or "labelled", as soon as one of the
    tasks needs masks. Raises UserError for unknown tasks and settings, a weight below zero, a segmenter without an
    encoder of this package and, when called, for a batch without other images or with fewer of them than tasks.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        *,
        size: int,
        task: str | list[str],
        task_weight: float = 0.3,
        task_settings: dict[str, Any] | None = None,
        combine: Literal["sum", "pcgrad"] = "sum",
        dice_weight: float = 0.5,
        average: float = 0.0,
        augment: Augment = "full",
    ) -> None:
        super().__init__()
        if task_weight < 0:
            raise UserError(f"'task_weight' cannot be {task_weight}: give a number of at least 0, such as 0.3.")
        self.segment = Segment(segmenter, size=size, dice_weight=dice_weight, average=average, augment=augment)
        tasks = build_tasks(task, task_settings or {}, trunk_of(segmenter), size)
        self.tasks = nn.ModuleDict(tasks if task_weight > 0 else {})
        self.task_weight, self.combine = task_weight, combine

    @property
    def segmenter(self) -> nn.Module:
        """The segmenter being trained."""
        return self.segment.segmenter

    @property
    def other_images(self) -> Literal["none", "all", "labelled"]:
        """What `Batch.other` must hold."""
        if not self.tasks:
            return "none"
        return "labelled" if any(task.needs_masks for _, task in self.named_tasks()) else "all"

    def named_tasks(self) -> list[tuple[str, AuxiliaryTask]]:
        """Return the tasks and their names, in the order in which they take their batches."""
        return [(name, task) for name, task in self.tasks.items() if isinstance(task, AuxiliaryTask)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the terms of `Segment`, and of each task its loss by its name and its terms, NAME_TERM."""
        terms = self.segment(batch)
        if not self.tasks:
            return terms
        losses, trunk, part = [terms["loss"]], trunk_of(self.segmenter), batch.other
        for name, task in self.named_tasks():
            if part is None:
                raise UserError("Joint training got a batch that has not gone through its views.")
            with running_statistics_kept(trunk):
                found = task(trunk, part)
            losses.append(self.task_weight * found["loss"])
            terms |= {name if key == "loss" else f"{name}_{key}": value.detach() for key, value in found.items()}
            part = part.other
        return terms | {"segmentation": terms["loss"].detach(), "loss": self.total(losses)}

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the sum of the weighted losses, its gradient in the trunk operated on if `combine` is "pcgrad"."""
        if self.combine == "sum":
            return torch.stack([loss.float() for loss in losses]).sum()
        shared = [p for p in trunk_of(self.segmenter).parameters() if p.requires_grad]
        known = set(map(id, shared))
        return surgery_loss(losses, shared, [p for p in self.parameters() if p.requires_grad and id(p) not in known])

    def product(self) -> nn.Module:
        """Return the segmenter, its weights averaged if `average` > 0; the tasks' heads are thrown away."""
        return self.segment.product()

    def views(self) -> Views:
        """Return the views of `Segment` for the batch and, after them, those of each task for its share of `other`."""
        segment_views = self.segment.views()

        def see(batch: Batch) -> Batch:
            # Segmentation draws first: what a task draws cannot change what the segmenter sees.
            seen = segment_views(replace(batch, other=None))
            if not self.tasks:
                return seen
            parts = split_evenly(batch.other, len(self.tasks))
            shown = []
            for (_, task), part in zip(self.named_tasks(), parts, strict=True):
                with drawing_for(part.share):
                    shown.append(task.see(part))
            return replace(seen, other=chain(shown))

        return see

    def after_step(self, progress: float) -> None:
        """Update the averaged weights."""
        self.segment.after_step(progress)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return the pictures of `Segment` and of each task."""
        shown, part = self.segment.preview(batch), batch.other
        for _, task in self.named_tasks():
            if part is not None:
                shown |= task.preview(trunk_of(self.segmenter), part)
                part = part.other
        return shown


def trunk_of(segmenter: nn.Module) -> Encoder:
    """Return the encoder that the tasks share with the segmenter."""
    encoder = getattr(segmenter, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise UserError("This segmenter has no encoder to share with a task; choose another, or the method 'segment'.")
    return encoder


@contextmanager
def running_statistics_kept(trunk: nn.Module) -> Iterator[None]:
    """Let batch normalisations in training use a batch's statistics without adding them to their running ones."""
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def build_tasks(
    names: str | list[str], settings: dict[str, Any], trunk: Encoder, size: int
) -> dict[str, AuxiliaryTask]:
    """Return the tasks by name, built with their settings; see `Joint`."""
    if isinstance(names, str):
        settings, names = {names: settings}, [names]
    if not names or len(set(names)) < len(names):
        raise UserError(f"'task' cannot be {names}: name at least one task, and none twice.")
    for name in sorted(set(settings) - set(names)):
        raise UserError(f"Unknown setting '{WHERE}.{name}'. Valid ones: {', '.join(names)} (settings by task).")
    tasks: dict[str, AuxiliaryTask] = {}
    for name in names:
        factory, own = choose(AUXILIARY, name, "auxiliary task"), settings.get(name, {})
        if not isinstance(own, dict):
            raise UserError(f"Setting '{WHERE}.{name}' cannot be {own!r}: give a table of the task's settings.")
        tasks[name] = build(factory, own, WHERE, encoder=trunk, size=size)
    return tasks


def split_evenly(batch: Batch | None, num_parts: int) -> list[Batch]:
    """Return consecutive parts of a raw batch, whose sizes differ by one at most."""
    if batch is None:
        raise UserError("Joint training needs a second batch for its auxiliary task, and this batch has none.")
    num = len(batch.names)
    if num < num_parts:
        raise UserError(
            f"A batch of {num} other images cannot be shared by {num_parts} auxiliary tasks: raise finetune.batch_size."
        )
    ends = [num * i // num_parts for i in range(num_parts + 1)]
    return [take_rows(batch, slice(*pair)) for pair in itertools.pairwise(ends)]


def take_rows(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch."""
    mask, label = (None if values is None else values[rows] for values in (batch.mask, batch.label))
    extra = {name: values[rows] for name, values in batch.extra.items()}
    share = batch.share and batch.share._replace(places=batch.share.places[rows])
    return Batch(batch.image[rows], batch.names[rows], mask, label, extra, share=share)


def chain(batches: Sequence[Batch]) -> Batch | None:
    """Return the first batch, the second in its field `other`, and so on; images with their channels last in memory."""
    linked: Batch | None = None
    for batch in reversed(batches):
        image = batch.image.contiguous(memory_format=torch.channels_last)
        linked = replace(batch, image=image, other=linked)
    return linked

"""What takes the place of a missing label: the teacher's prediction, and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewmask.types import Batch, SegOutput


class Supervision(NamedTuple):
    """Of each image: whether it has a label, bool (b,); its mask (b, 1, s, s); and its confidence in [0, 1], (b,).

    Without a label, `mask` is the teacher's probability and `confidence` how much it agrees with its own decision.
    """

    labelled: Tensor
    mask: Tensor
    confidence: Tensor

    @property
    def decided(self) -> Tensor:
        """The mask with the teacher's predictions made 0 or 1; labels stay as they are."""
        return torch.where(self.labelled[:, None, None, None], self.mask, (self.mask >= 0.5).float())


def supervise(batch: Batch, teacher_logits: Tensor | None) -> Supervision:
    """Return the batch's supervision: labels where it has them, the teacher's prediction elsewhere.

    `batch.extra["has_mask"]` bool (b,) says which rows of `batch.mask` are labels (absent: all of them); what the other
    rows hold is never looked at. Without logits their confidence is 0.
    """
    labelled = labelled_rows(batch)
    if teacher_logits is None:
        return _labels_alone(batch, labelled)
    probability = teacher_logits.float().sigmoid()
    confidence = torch.where(labelled, 1.0, agreement(probability))
    if batch.mask is None:
        return Supervision(labelled, probability, confidence)
    # `where` and no product: the place of a missing label may hold anything, not-a-number included.
    return Supervision(labelled, torch.where(labelled[:, None, None, None], batch.mask, probability), confidence)


def _labels_alone(batch: Batch, labelled: Tensor) -> Supervision:
    blank = torch.zeros_like(batch.image[:, :1], dtype=torch.float32)
    mask = blank if batch.mask is None else torch.where(labelled[:, None, None, None], batch.mask, blank)
    return Supervision(labelled, mask, labelled.float())


def take_stored(batch: Batch, levels: Sequence[int] = (), temperature: float = 1.0) -> tuple[Batch, SegOutput | None]:
    """Return the batch without what was stored of a teacher, and this as its output, None where it is not enough.

    The second channel of `batch.mask` is the mean of sigma(z / T) over the teachers, T the temperature. It was kept in
    steps of 1/255: what is nearer to 0 or 1 than half a step counts as half a step away, so that logits stay within
    +-6.3 T. `batch.features` are those of the teacher's `levels`; a level between them that nobody reads is empty.
    """
    if batch.mask is None or batch.mask.shape[1] == 1:
        return batch, None
    logits = temperature * torch.logit(batch.mask[:, 1:].float(), eps=0.5 / 255)
    bare = replace(batch, mask=batch.mask[:, :1], features=[])
    if len(batch.features) != len(levels):
        return bare, None
    known = dict(zip(levels, batch.features, strict=True))
    empty = logits.new_empty(len(logits), 0, 1, 1)
    return bare, SegOutput(logits, [known.get(level, empty) for level in range(max(known, default=-1) + 1)])


def labelled_rows(batch: Batch) -> Tensor:
    """Return which images have a label, bool (b,)."""
    everywhere = torch.full((len(batch.image),), batch.mask is not None, device=batch.image.device)
    return everywhere & batch.extra["has_mask"].bool() if "has_mask" in batch.extra else everywhere


def agreement(probability: Tensor) -> Tensor:
    """Return how sure a prediction (b, 1, s, s) is, in [0, 1], (b,): the soft Dice of p and p >= 0.5 (our choice).

    Where no pixel reaches 0.5 that says nothing, and it is the mean of |2 p - 1|: 1 for a certain "no lesion".
    """
    p = probability.flatten(1)
    hard = (p >= 0.5).float()
    dice = 2 * (p * hard).sum(1) / (p.sum(1) + hard.sum(1)).clamp(min=1e-6)
    return torch.where(hard.any(1), dice, (2 * p - 1).abs().mean(1))


def weighted_mean(each: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of weight x each over the chosen images, 0 where none is chosen; all (b,)."""
    return (each * weight * chosen).sum() / chosen.sum().clamp(min=1)

"""Two streams of batches as one: labelled and unlabelled images in one batch, or side by side."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewmask.data.loader import Loader
from fewmask.types import Batch, Share


class MixedLoader:
    """Batches whose first rows have a mask and whose last rows have none.

    `extra["has_mask"]` bool (b,) says which; the mask of a row without one is zero. Either both streams have
    predictions as a second channel of the mask, or none, and likewise features. An epoch is one of the labelled stream:
    what a user counts is how often the masks were seen.
    """

    def __init__(self, labelled: Loader, unlabelled: Loader) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled
        self.steps_per_epoch, self.rounds = labelled.steps_per_epoch, labelled.rounds
        self.num_images = labelled.num_images + unlabelled.num_images

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return this process's part of both streams' batches of a step; raises as `Loader.batch` does."""
        known, unknown = self.labelled.batch(step, rank, world), self.unlabelled.batch(step, rank, world)
        image = torch.cat([known.image, unknown.image]).contiguous(memory_format=torch.channels_last)
        assert known.mask is not None
        blank = known.mask.new_zeros(len(unknown.names), *known.mask.shape[1:])
        mask = torch.cat([known.mask, blank if unknown.mask is None else unknown.mask])
        label = None
        if known.label is not None and unknown.label is not None:
            label = torch.cat([known.label, unknown.label])
        has_mask = torch.arange(len(image)) < len(known.names)
        features = [torch.cat(pair) for pair in zip(known.features, unknown.features, strict=True)]
        share = joined(known.share, unknown.share)
        return Batch(image, known.names + unknown.names, mask, label, {"has_mask": has_mask}, features, share=share)


def joined(first: Share | None, second: Share | None) -> Share | None:
    """Return the share of a batch that is one batch after another, as one process has them."""
    if first is None or second is None:
        return None
    return Share(first.places + tuple(first.total + place for place in second.places), first.total + second.total)


class PairedLoader:
    """Batches of one stream, each with a batch of another beside it in `other`; an epoch is one of the first."""

    def __init__(self, main: Loader, other: Loader) -> None:
        self.main, self.other = main, other
        self.steps_per_epoch, self.rounds = main.steps_per_epoch, main.rounds
        self.num_images = main.num_images + other.num_images

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return this process's part of a step's batch, and of the other stream's in its field `other`."""
        return replace(self.main.batch(step, rank, world), other=self.other.batch(step, rank, world))

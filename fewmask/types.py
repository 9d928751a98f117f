"""The nouns every room shares: a case, a batch, what a segmenter returns, and the error shown to a user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class UserError(Exception):
    """Something the user can mend; its message is one sentence: which file, what is wrong, what to do. Exit code 1."""


class NotTrainedError(UserError):
    """A training ended by what it learnt (a collapse, a loss that is not finite): to a table that is a result."""


class FolderInUseError(UserError):
    """Another process works in a run folder."""


class Interrupted(Exception):
    """The user (or the system) asked to stop; everything needed to go on is on disk. Exit code 130."""


@dataclass(frozen=True, slots=True)
class Case:
    """One image of a data set and, where there is one, its mask.

    `name` is unique within a manifest; `group` is the patient or lesion (the name itself where unknown); `split` is
    None until it is given or assigned, and stays None for unlabelled images that belong to no split.
    """

    name: str
    image: Path
    mask: Path | None = None
    split: Split | None = None
    group: str = ""
    label: str | None = None

    def in_split(self, split: Split | None) -> Case:
        """Return a copy of this case in another split."""
        return replace(self, split=split)


class Share(NamedTuple):
    """Which rows of a batch that several processes share are those of this one, and how many it has in all."""

    places: tuple[int, ...]
    total: int


@dataclass(slots=True)
class Batch:
    """What a loader yields and an objective reads.

    As loaded: `image` uint8 (b, 3, c, c) at cache size, `mask` uint8 (b, 1, c, c) holding 0..255 coverage or None.
    After an objective's views: `image` float32 (b, 3, s, s), normalised; `mask` float32 (b, 1, s, s) in [0, 1] or None.
    `label` is int64 (b,), -1 where unknown. `extra` holds what a method adds (a second view, a superpixel map).
    `features` are what was stored of a teacher's features, float16 (b, c_i, h_i, w_i), which the views of segmentation
    move with their picture. `other` is a batch of other images that is loaded beside this one, for an objective that
    learns a second task from them. `share` says where these images stand in the batch of all processes, None where
    there is one.
    """

    image: Tensor
    names: list[str]
    mask: Tensor | None = None
    label: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    other: Batch | None = None
    share: Share | None = None

    def to(self, device: object) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            image=self.image.to(device, non_blocking=True),  # type: ignore[call-overload]
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),  # type: ignore[call-overload]
            label=None if self.label is None else self.label.to(device, non_blocking=True),  # type: ignore[call-overload]
            extra={k: v.to(device, non_blocking=True) for k, v in self.extra.items()},  # type: ignore[call-overload]
            features=[feature.to(device, non_blocking=True) for feature in self.features],  # type: ignore[call-overload]
            other=None if self.other is None else self.other.to(device),
        )


@dataclass(frozen=True, slots=True)
class SegOutput:
    """What every segmenter returns: `logits` (b, 1, s, s) and `features`, fine to coarse, each (b, c_i, h_i, w_i)."""

    logits: Tensor
    features: list[Tensor]


Views = Callable[[Batch], Batch]

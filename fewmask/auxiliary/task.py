"""What every auxiliary task offers: views that make its target, a head of its own, and a loss on a trunk it is lent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

from torch import Tensor, nn

from fewmask.auxiliary.augmentation import Augmentation, Kind
from fewmask.models import Encoder
from fewmask.types import Batch, UserError, Views

Property = Literal["orientation", "context", "instance", "appearance", "geometry"]


class AuxiliaryTask(nn.Module, ABC):
    """A task whose target comes from the image (or its mask), solved by a head on features of an encoder, the trunk.

    The trunk is handed to each call and is no part of the task, so that one object serves both modes: pre-training
    (`pretrain.auxiliary`) and joint training beside segmentation (`finetune.joint`). The head belongs to the task.

    `name` is the key of the table. `property_` says what the task teaches: "orientation" (which way up), "context"
    (where parts belong), "instance" (what makes an image itself, whatever its crop and colour), "appearance"
    (intensity and texture) or "geometry" (shape and place of the labelled object). A task with `needs_masks` learns
    from labelled images only; one that compares images needs `min_batch` of them at once. `conflicts` are the kinds of
    augmentation that would spoil its target.

    A subclass's constructor takes the encoder, of which it reads widths and strides only, the side of its views in
    pixels, and settings. Raises UserError for an augmentation in `conflicts`, or a crop that cannot be.
    """

    name: ClassVar[str]
    property_: ClassVar[Property]
    needs_masks: ClassVar[bool] = False
    min_batch: ClassVar[int] = 1
    conflicts: ClassVar[frozenset[Kind]] = frozenset()

    def __init__(self, size: int, augment: Iterable[Kind], crop_scale: tuple[float, float]) -> None:
        super().__init__()
        kinds = frozenset(augment)
        for kind in sorted(kinds & self.conflicts):
            raise UserError(
                f"The task '{self.name}' cannot be combined with the augmentation '{kind}', which would change what is "
                "to be predicted: take it out of 'augment'."
            )
        self.augmentation = Augmentation(size, kinds, crop_scale)

    @abstractmethod
    def see(self, batch: Batch) -> Batch:
        """Return the task's input, `image` float32 (b, 3, s, s) normalised, its target in `extra`, from a raw batch."""

    @abstractmethod
    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and the scalar terms to log, from a batch that went through the views."""

    @abstractmethod
    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return named pictures (b, 3, s, k s) in [0, 1] for the report; call it without gradient, in eval mode."""

    def views(self) -> Views:
        """Return `see`; it draws from torch's global generator."""
        return self.see


def check_share(name: str, value: float) -> None:
    """Raise a UserError unless the value of a setting is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"'{name}' cannot be {value}: give a number between 0 and 1.")

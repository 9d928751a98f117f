"""Rotation prediction: which of four ways has the picture been turned?"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.auxiliary.augmentation import Kind, random_start, turn_quarters
from fewmask.auxiliary.task import AuxiliaryTask
from fewmask.data.preprocess import denormalise, normalise
from fewmask.models import Encoder
from fewmask.types import Batch


class Rotation(AuxiliaryTask):
    """Predict a turn by 0, 90, 180 or 270 degrees (RotNet, Gidaris et al. 2018): four classes, cross-entropy.

    Paper: the four turns, crops and left-right flips before them. Two-stage method (arXiv 2402.07119, abstract only):
    rotation as one of its five tasks, on X-rays, which have an up. Ours: a dermoscopic picture has none, so the turn
    can be told from what hardly ever turns only (light, vignette, hair, text): there the task may teach little, and
    validation has to say so; the global feature (`Encoder.global_feature`) and one linear layer; every turn a
    quarter of the batch, where the paper shows each image in all four.

    A top-bottom flip is in conflict: with both flips, an upright picture and one turned by 180 degrees have the same
    distribution, and the target could not be told.
    """

    name = "rotation"
    property_ = "orientation"
    conflicts = frozenset({"rotation", "vertical_flip"})

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        augment: tuple[Kind, ...] = ("crop", "flip"),
        crop_scale: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        super().__init__(size, augment, crop_scale)
        self.head = nn.Linear(encoder.channels[-1], 4)

    def see(self, batch: Batch) -> Batch:
        """Return the turned pictures, `extra["turn"]` int64 (b,) the number of anticlockwise quarter turns."""
        picture = self.augmentation.colour(self.augmentation.move(replace(batch, mask=None)))
        turned, turn = turn_quarters(picture, random_start(len(picture)))
        return replace(batch, image=normalise(turned), mask=None, extra={"turn": turn})

    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and "accuracy"."""
        logits, turn = self.head(trunk.global_feature(batch.image)).float(), batch.extra["turn"]
        return {"loss": F.cross_entropy(logits, turn), "accuracy": (logits.argmax(1) == turn).float().mean()}

    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "turned", what the network sees."""
        return {"turned": denormalise(batch.image)}

"""Teachers that cannot learn: frozen, always in eval mode, and no part of any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.distill.align import map_size, resize
from fewmask.types import SegOutput, UserError


class FrozenTeacher(nn.Module):
    """A segmenter that only answers: eval mode forever, no gradient, and nothing of it in a state dict.

    The segmenter is kept where `nn.Module` does not look, so that parameters(), state_dict() and checkpoints leave it
    out; `to` moves it all the same. A teacher fine-tuned at another size gets the image at its own (`size`; None: its
    encoder's), and its logits come back at the image's; its features stay as they are.
    """

    def __init__(self, segmenter: nn.Module, size: int | None = None) -> None:
        super().__init__()
        self.hidden = (segmenter.requires_grad_(False).eval(),)
        self.size = size if size is not None else size_of(segmenter)

    @property
    def segmenter(self) -> nn.Module:
        """The network that answers."""
        return self.hidden[0]

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Leave the teacher in eval mode, whatever is asked for."""
        self.segmenter.eval()
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        self.segmenter._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, image: Tensor) -> SegOutput:
        """Return float32 logits (b, 1, s, s) and the features for normalised images (b, 3, s, s)."""
        side = image.shape[2] if self.size is None else self.size
        output = self.segmenter(resize(image, (side, side)))
        # As in prediction: logits are resized without antialiasing.
        logits = output.logits.float()
        if map_size(logits) != map_size(image):
            logits = F.interpolate(logits, map_size(image), mode="bilinear", align_corners=False)
        return SegOutput(logits, output.features)


class EnsembleTeacher(nn.Module):
    """Several frozen teachers that answer as one: mean probability, features of the first. One alone answers as it is.

    Raises UserError when there is none.
    """

    def __init__(self, segmenters: Sequence[nn.Module]) -> None:
        if not segmenters:
            raise UserError("Distillation needs a teacher, and none was given: name at least one fine-tuned segmenter.")
        super().__init__()
        self.members = nn.ModuleList(map(FrozenTeacher, segmenters))

    def outputs(self, image: Tensor) -> list[SegOutput]:
        """Return what each member says of normalised images (b, 3, s, s)."""
        return [member(image) for member in self.members]

    def members_logits(self, image: Tensor) -> list[Tensor]:
        """Return each member's logits (b, 1, s, s), for losses that are averaged over teachers."""
        return [output.logits for output in self.outputs(image)]

    def forward(self, image: Tensor, temperature: float = 1.0) -> SegOutput:
        """Return `merge` of what the members say of normalised images (b, 3, s, s)."""
        return merge(self.outputs(image), temperature)


def merge(outputs: Sequence[SegOutput], temperature: float = 1.0) -> SegOutput:
    """Return one answer for several: the logit of the mean probability (b, 1, s, s), and the features of the first.

    At a temperature T it is T times the logit of the mean of sigma(z / T). log(mean p) - log(mean(1 - p)) is computed
    from the logits, so that it stays finite where every p rounds to 0 or 1.
    """
    if len(outputs) == 1:
        return outputs[0]
    logits = torch.stack([output.logits.float() for output in outputs]) / temperature
    logit = F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
    return SegOutput(temperature * logit, outputs[0].features)


def size_of(segmenter: nn.Module) -> int | None:
    """Return the size in pixels a segmenter was made for, or None where it does not say."""
    size: Any = getattr(getattr(segmenter, "encoder", None), "size", None)
    return size if isinstance(size, int) else None

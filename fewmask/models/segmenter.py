"""What every segmenter offers: logits at the size of the image, and features for whoever learns from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from fewmask.models.encoder import Encoder
from fewmask.types import SegOutput


class Segmenter(nn.Module, ABC):
    """An encoder and a decoder that turn an image into the logits of one mask.

    `settings` are the arguments of the constructor other than the encoder: with `name` and the encoder's own
    description they are enough to build it again.
    """

    def __init__(self, name: str, encoder: Encoder, settings: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.encoder = encoder
        self.settings = settings

    @abstractmethod
    def forward(self, image: Tensor) -> SegOutput:
        """Return logits (b, 1, s, s) and features fine to coarse for a normalised image (b, 3, s, s)."""

    @property
    def spec(self) -> dict[str, Any]:
        """What is needed to build this segmenter on its encoder again, ready for JSON."""
        return {"name": self.name, "settings": self.settings}

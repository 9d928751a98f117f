"""What every encoder offers: features at several strides, and what is needed to build it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewmask.types import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputAffine(nn.Module):
    """Change the normalisation of an image from ImageNet's to the one some weights were trained with.

    The project normalises by ImageNet's mean and standard deviation everywhere; weights that expect another pair set
    it here, so that no caller has to know. The identity until `expect` is called; the pair travels with the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.scale: Tensor
        self.shift: Tensor

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """From now on hand the weights (x - mean) / std of the picture x in [0, 1]."""
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
        )
        self.scale.copy_(old_std / new_std)
        self.shift.copy_((old_mean - new_mean) / new_std)

    def forward(self, image: Tensor) -> Tensor:
        """Return the image (b, 3, h, w) in the normalisation that the weights expect."""
        return torch.addcmul(self.shift, image, self.scale)


class Encoder(nn.Module, ABC):
    """Something that turns an image into features.

    `strides` and `channels` describe the features, fine to coarse. `size` is the side in pixels it was built for and
    `settings` the other arguments of its constructor: together with `name` they are enough to build it again.
    """

    kind: Literal["vit", "cnn"]
    strides: tuple[int, ...]
    channels: tuple[int, ...]

    def __init__(self, name: str, size: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self.settings = settings
        self.input_affine = InputAffine()

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features of a normalised image (b, 3, s, s): a list of (b, c_i, s / stride_i, s / stride_i)."""

    def global_feature(self, image: Tensor) -> Tensor:
        """Return one vector (b, channels[-1]) per image (b, 3, s, s): the mean of the coarsest map, where not told."""
        return self(image)[-1].mean((2, 3))

    @property
    def spec(self) -> dict[str, Any]:
        """What is needed to build this encoder again, ready for JSON."""
        return {"name": self.name, "settings": self.settings}


def check_divisible(size: int, stride: int, name: str) -> None:
    """Raise a UserError when an image of this size does not divide into whole cells of the stride."""
    if size <= 0 or size % stride:
        below, above = max(size // stride, 1) * stride, (max(size // stride, 0) + 1) * stride
        choice = f"{below} or {above}" if below != above else f"{above}"
        raise UserError(
            f"An image size of {size} does not fit the encoder '{name}', which needs a multiple of {stride}: "
            f"choose {choice}."
        )

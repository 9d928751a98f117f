"""Convolutional encoders of timm, as segmentation-models-pytorch prepares them for a U-Net."""

from __future__ import annotations

from typing import Any, Literal

import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from fewmask.models.drop_path import share_drop_paths
from fewmask.models.encoder import Encoder, check_divisible
from fewmask.types import UserError


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that stays in float32 under mixed precision on a CPU.

    oneDNN's bfloat16 weight gradient of a depthwise convolution is many times slower than its float32 one; keeping
    these few operations in float32 is what makes bfloat16 training worth while on a CPU (measured in benchmarks).
    """

    def forward(self, image: Tensor) -> Tensor:
        """Return the convolution of (b, c, h, w)."""
        if image.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(image)
        with torch.autocast("cpu", enabled=False):
            return super().forward(image.float())


class Cnn(Encoder):
    """Any CNN of timm with features at strides 2 to 32 (4 to 32 for those that start with a stride of 4).

    `body` is the encoder of segmentation-models-pytorch, so a U-Net's weights move between the two libraries.
    `norm_eps` overrides the epsilon of every batch normalisation (weights converted from TensorFlow need 0.001).
    `size` is a multiple of 32. Raises UserError for a name timm does not have, or a network without such features.
    """

    kind: Literal["cnn"] = "cnn"

    def __init__(self, name: str, size: int, drop_path: float = 0.0, norm_eps: float | None = None) -> None:
        check_divisible(size, 32, name)
        super().__init__(name, size, {"drop_path": drop_path, "norm_eps": norm_eps})
        self.body: Any = create_body(name, drop_path)
        used = [(c, 2**i) for i, c in enumerate(self.body.out_channels) if c and i]
        self.channels, self.strides = tuple(c for c, _ in used), tuple(s for _, s in used)
        self.check_features()
        if norm_eps is not None:
            self.set_norm_eps(norm_eps)

    @torch.no_grad()
    def check_features(self) -> None:
        """Raise a UserError unless an image gives the features that timm declares: some networks do not pad."""
        self.eval()
        try:
            found = [tuple(feature.shape[1:]) for feature in self(torch.zeros(1, 3, self.size, self.size))]
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise _unsuited(self.name, str(error)) from None
        self.train()
        if found != [(c, self.size // s, self.size // s) for c, s in zip(self.channels, self.strides, strict=True)]:
            sides = ", ".join(str(side) for _, side, _ in found)
            raise _unsuited(self.name, f"an image of {self.size} pixels gives features of {sides}")

    def set_norm_eps(self, eps: float) -> None:
        """Set the epsilon of every batch normalisation, and remember it as a setting."""
        self.settings["norm_eps"] = eps
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the image itself and the features at strides 2 to 32, as a U-Net of smp reads them."""
        return self.body(self.input_affine(image))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features fine to coarse, (b, channels_i, s / strides_i, s / strides_i)."""
        return [f for f in self.pyramid(image)[1:] if f.shape[1]]


def create_body(name: str, drop_path: float) -> Any:
    """Return smp's encoder of a timm CNN without pretrained weights."""
    options = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        body = get_encoder(f"tu-{name}", in_channels=3, depth=5, weights=None, **options)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise _unsuited(name, str(error)) from None
    if len(body.out_channels) != 6:
        raise _unsuited(name, f"it has {len(body.out_channels) - 1} features")
    for module in body.modules():
        if type(module) is nn.Conv2d and module.groups > 1 and module.groups == module.in_channels:
            module.__class__ = DepthwiseConv2d
    share_drop_paths(body)
    return body


def _unsuited(name: str, reason: str) -> UserError:
    return UserError(
        f"The timm model '{name}' cannot be an encoder with these settings ({reason}): choose a CNN with features at "
        "strides 2 to 32, for example efficientnet_lite0."
    )

"""Batched colour augmentation: callables from float32 pictures (b, 3, h, w) in [0, 1] to the same.

Every picture has a draw of its own, taken on the host from torch's global generator; noise is drawn on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.data.geometry import check_range, uniform
from fewmask.draws import draw_each, drawing_for, rows_of_all
from fewmask.types import Share

Picture = Callable[[Tensor], Tensor]

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB to luma and two chroma axes (NTSC); its first row is the luma that grayscale and contrast use."""


def apply_to_some(x: Tensor, probability: float, change: Picture) -> Tensor:
    """Return `x` with `change` applied to each picture with a probability; the input is left as it is."""
    rows, total = rows_of_all(len(x))
    everywhere = torch.rand(total) < probability
    own = everywhere[rows].nonzero().squeeze(1)
    if not everywhere.any():
        return x
    # What `change` draws is drawn for the chosen ones of all processes.
    places = (everywhere.cumsum(0) - 1)[rows[own]].tolist()
    with drawing_for(None if total == len(x) else Share(tuple(places or [0]), int(everywhere.sum()))):
        if len(own) == 0:
            change(x[:1])  # for its draws alone: other processes make them too
            return x
        if len(own) == len(x):
            return change(x)
        chosen = own.to(x.device)
        return x.index_copy(0, chosen, change(x[chosen]))


@dataclass(frozen=True)
class Chain:
    """Apply the steps in the order given."""

    steps: tuple[Picture, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pictures after every step."""
        for step in self.steps:
            x = step(x)
        return x


@dataclass(frozen=True)
class ColourJitter:
    """Change brightness, contrast, saturation and hue, always in this order, with probability `p` per picture.

    The first three are factors drawn from [max(0, 1 - v), 1 + v]; `hue` is a turn of the colour circle drawn from
    [-v, v] (0.5 is half a turn), all as in torchvision. Ours: the hue turns the chroma plane of YIQ, a 3x3 matrix,
    where torchvision goes through HSV; and values are clamped once, at the end. So the four are one affine map.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    p: float = 0.8

    def __call__(self, x: Tensor) -> Tensor:
        """Return the jittered pictures."""
        chosen = draw_each(len(x), torch.rand) < self.p
        factors = [self._factor(chosen, bound) for bound in (self.brightness, self.contrast, self.saturation)]
        turn = uniform(len(x), -self.hue, self.hue) * chosen
        return adjust(x, factors[0], factors[1], factors[2], turn)

    @staticmethod
    def _factor(chosen: Tensor, bound: float) -> Tensor:
        return torch.where(chosen, uniform(len(chosen), max(0.0, 1 - bound), 1 + bound), 1.0)


def adjust(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, turn: Tensor) -> Tensor:
    """Return `x` (b, 3, h, w) with the given factors and hue turn, each (b,) on the host, clamped to [0, 1].

    Contrast moves values away from or towards the picture's mean luma; saturation and hue keep the luma.
    """
    linear = hue_saturation(saturation, turn) * (brightness * contrast)[:, None, None]
    luma = x.mean((2, 3)) @ YIQ[0].to(x.device)
    bias = ((1 - contrast) * brightness).to(x.device) * luma
    # Saturation and hue map gray to itself, so the contrast's gray offset passes through them unchanged.
    flat = torch.baddbmm(bias[:, None, None].expand(-1, 3, 1), linear.to(x.device), x.flatten(2))
    return flat.clamp_(0, 1).view_as(x)


def hue_saturation(saturation: Tensor, turn: Tensor) -> Tensor:
    """Return the matrices (b, 3, 3) that scale YIQ's chroma plane by `saturation` and turn it by `turn` (in turns)."""
    # YIQ's chroma axes run against the colour circle, hence the minus.
    angle = -2 * math.pi * turn.double()
    cos, sin = saturation * angle.cos(), saturation * angle.sin()
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    basis = YIQ.double()
    return (torch.linalg.inv(basis) @ rotation @ basis).float()


@dataclass(frozen=True)
class RandomGrayscale:
    """Replace a picture by its luma in all three channels with probability `p`."""

    p: float = 0.2

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pictures, some of them gray."""
        return apply_to_some(x, self.p, grayscale)


def grayscale(x: Tensor) -> Tensor:
    """Return the luma of `x` (b, 3, h, w) in three equal channels."""
    return torch.einsum("bkhw,k->bhw", x, YIQ[0].to(x.device))[:, None].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur a picture with probability `p`; its `sigma`, in pixels of the view, is drawn uniformly from the range."""

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def __post_init__(self) -> None:
        check_range("sigma", self.sigma)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pictures, some of them blurred."""
        return apply_to_some(x, self.p, lambda some: blur(some, uniform(len(some), *self.sigma)))


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Return `x` (b, k, h, w) blurred by a Gaussian of `sigma` (b,) pixels, cut at 3 sigma, edges repeated.

    One grouped convolution per axis: each plane of the batch is a channel with a kernel of its own, zero beyond its own
    reach, so that what is blurred beside a picture makes no difference to it.
    """
    num, channels, height, width = x.shape
    radius = math.ceil(3 * float(sigma.max()))
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (offset.abs() <= (3 * sigma).ceil()[:, None])
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device).repeat_interleave(channels, 0)[:, None]
    planes = x.reshape(1, num * channels, height, width)
    padded = F.pad(planes, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel[..., None], groups=num * channels)
    return F.conv2d(rows, kernel[:, :, None], groups=num * channels).view_as(x)


@dataclass(frozen=True)
class GaussianNoise:
    """Add white noise with probability `p`; its standard deviation is drawn uniformly from [0, `sigma`] per picture."""

    sigma: float = 0.03
    p: float = 0.2

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pictures, some of them noisy, clamped to [0, 1]."""
        return apply_to_some(x, self.p, self._add)

    def _add(self, x: Tensor) -> Tensor:
        sigma = uniform(len(x), 0.0, self.sigma).to(x.device)[:, None, None, None]
        noise = draw_each(len(x), lambda n: torch.randn(n, *x.shape[1:], device=x.device))
        return torch.addcmul(x, noise, sigma).clamp_(0, 1)

"""EC: the same picture with other intensities and textures, by random convolutions and a linear interpolation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewmask.draws import draw_each
from fewmask.types import Batch, UserError, Views

ConversionName = Literal["gin", "randconv"]


class RandomLayer(NamedTuple):
    """A convolution of its own for each image: `weight` (b, out, in, k, k), `bias` (b, out)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class ExteriorConversion:
    """Convert the exterior of pictures: alpha EC(x) + (1 - alpha) x (TEDMAE's EC).

    Paper (TEDMAE, abstract): random convolution kernels and linear interpolation give an image of the same shape with
    other intensities and textures. Ours, `name` "gin" (as GIN, Ouyang et al. 2022): per image a fresh net of
    `num_layers` convolutions with `hidden` channels between them, kernel 1 or 3 (drawn per image and layer), weights
    and shifts from N(0, 1), leaky ReLU (slope 0.01) after all but the last. "randconv" (RandConv, Xu et al. 2021): one
    convolution, kernel 1, 3, 5 or 7, weights from N(0, 1 / (3 k^2)), no shift. Either output is scaled to the
    Frobenius norm of its picture before it is mixed in, so that alpha is its share; GIN's code mixes first and scales
    the mixture, which is mostly the net's output, as that is louder. alpha ~ U(0, 1) per image. Borders are padded
    with zeros.

    A batch is one grouped convolution per layer. Everything is drawn from torch's global generator.
    """

    name: ConversionName = "gin"
    num_layers: int = 4
    hidden: int = 2

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.hidden < 1:
            raise UserError(
                f"Exterior conversion cannot have {self.num_layers} layers of {self.hidden} channels: give numbers "
                "above zero (4 and 2 are usual)."
            )

    def __call__(self, image: Tensor) -> Tensor:
        """Return the mixed pictures (b, 3, h, w) of float pictures, in their dtype."""
        alpha = draw_each(len(image), torch.rand).to(image)[:, None, None, None]
        return torch.lerp(image, self.convert(image), alpha)

    def convert(self, image: Tensor) -> Tensor:
        """Return EC(x), of the shape, dtype and norms of `image` (b, 3, h, w), before it is mixed with it."""
        x = image
        for number, layer in enumerate(self.draw_layers(len(image))):
            x = F.leaky_relu(x) if number else x
            x = apply_layer(x, RandomLayer(layer.weight.to(x), layer.bias.to(x)))
        return match_norm(x, image)

    def draw_layers(self, num_images: int) -> list[RandomLayer]:
        """Return fresh layers for so many pictures, on the host."""
        if self.name == "randconv":
            return [draw_layer(num_images, 3, 3, (1, 3, 5, 7), scaled=True)]
        widths = [3, *[self.hidden] * (self.num_layers - 1), 3]
        return [draw_layer(num_images, n, m, (1, 3)) for n, m in pairwise(widths)]


def draw_layer(
    num_images: int, num_in: int, num_out: int, kernels: tuple[int, ...], scaled: bool = False
) -> RandomLayer:
    """Return a random layer; smaller kernels stand in the middle of the largest one, with zeros around them.

    `scaled` divides the weights by sqrt(num_in k^2) and leaves the shift out (RandConv); otherwise both are N(0, 1).
    """
    largest = max(kernels)
    side = torch.tensor(kernels)[draw_each(num_images, lambda n: torch.randint(len(kernels), (n,)))]
    offset = (torch.arange(largest) - largest // 2).abs()
    reach = torch.maximum(offset[:, None], offset[None, :])
    used = reach <= (side // 2)[:, None, None, None, None]
    weight = draw_each(num_images, lambda n: torch.randn(n, num_out, num_in, largest, largest)) * used
    if scaled:
        weight = weight / (num_in * side.float() ** 2).sqrt()[:, None, None, None, None]
        return RandomLayer(weight, torch.zeros(num_images, num_out))
    return RandomLayer(weight, draw_each(num_images, lambda n: torch.randn(n, num_out)))


def apply_layer(x: Tensor, layer: RandomLayer) -> Tensor:
    """Return each picture of `x` (b, in, h, w) convolved with its own kernels, (b, out, h, w)."""
    num, num_in, height, width = x.shape
    kernel = layer.weight.shape[-1]
    planes = x.reshape(1, num * num_in, height, width)
    out = F.conv2d(planes, layer.weight.flatten(0, 1), layer.bias.flatten(), padding=kernel // 2, groups=num)
    return out.view(num, -1, height, width)


def match_norm(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` (b, 3, h, w) scaled per picture to the Frobenius norm of `like`."""
    norms = [torch.linalg.vector_norm(t.float(), dim=(1, 2, 3), keepdim=True) for t in (x, like)]
    return (x * (norms[1] / norms[0].clamp(min=1e-12))).to(like.dtype)


@dataclass(frozen=True)
class ConvertedViews:
    """Other views, and their picture converted as `extra["converted"]`."""

    views: Views
    conversion: ExteriorConversion

    def __call__(self, batch: Batch) -> Batch:
        """Return the views' batch with the converted picture beside it."""
        seen = self.views(batch)
        return replace(seen, extra={**seen.extra, "converted": self.conversion(seen.image)})

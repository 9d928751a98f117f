"""From a raw batch to a normalised one, augmented: batched, on the batch's device, from torch's global generator.

Every class here is a `Views`: it takes a `Batch` as loaded (uint8) and returns a new one; the input is not changed.
`label` and `extra` pass through untouched: a method whose `extra` holds a map over pixels moves it itself. `features`
move with their picture in the views of segmentation, at their own resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewmask.data.colour import Chain, ColourJitter, GaussianBlur, GaussianNoise, Picture
from fewmask.data.geometry import (
    affine,
    check_area,
    check_range,
    crop_resize,
    flip_boxes,
    random_boxes,
    random_flips,
    uniform,
    warp,
    whole_boxes,
)
from fewmask.data.preprocess import normalise
from fewmask.draws import draw_each
from fewmask.types import Batch, Views

Augment = Literal["full", "flips", "xray", "none"]
DERMOSCOPY_COLOUR = Chain((ColourJitter(0.25, 0.25, 0.25, 0.03), GaussianBlur((0.1, 1.0), 0.2), GaussianNoise()))
XRAY_COLOUR = ColourJitter(0.25, 0.25, 0.0, 0.0)


def stack_mask(batch: Batch) -> Tensor:
    """Return a raw batch's picture, then the channels of its mask, if any: float32 (b, 3 + m, c, c) in [0, 1].

    One tensor, so that one resampling moves both. Raises TypeError unless both are uint8.
    """
    parts = [batch.image] if batch.mask is None else [batch.image, batch.mask]
    if any(part.dtype != torch.uint8 for part in parts):
        raise TypeError("Views take a raw batch: uint8 image and mask.")
    num, _, height, width = batch.image.shape
    x = torch.empty(num, sum(part.shape[1] for part in parts), height, width, device=batch.image.device)
    x[:, :3] = batch.image
    if batch.mask is not None:
        x[:, 3:] = batch.mask
    return x.div_(255)


def unstack(batch: Batch, x: Tensor, colour: Picture | None) -> Batch:
    """Return the batch with its picture and mask taken from `x` (b, 3 + m, s, s); the picture coloured, normalised."""
    x = x.clamp_(0, 1)
    image = x[:, :3] if colour is None else colour(x[:, :3])
    return replace(batch, image=normalise(image), mask=None if batch.mask is None else x[:, 3:].contiguous())


@dataclass(frozen=True)
class PlainViews:
    """Resize to `size` with antialiasing and normalise; nothing random."""

    size: int

    def __call__(self, batch: Batch) -> Batch:
        """Return the normalised batch."""
        x = stack_mask(batch)
        return unstack(batch, crop_resize(x, whole_boxes(len(x)), self.size), None)


@dataclass(frozen=True)
class PretrainViews:
    """Random resized crop, flips and, if given, colour.

    `scale` is the range of the crop's area (share of the image) and `ratio` of its width/height; MAE's defaults.
    `flip` mirrors left-right; `vertical` also top-bottom, which MAE does not: a dermoscopic picture has no up (ours);
    set it to False for radiographs. `colour` maps float pictures (b, 3, s, s) in [0, 1] to the same.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    vertical: bool = True
    colour: Picture | None = None

    def __post_init__(self) -> None:
        check_area("crop_scale", self.scale)
        check_range("ratio", self.ratio)

    def __call__(self, batch: Batch) -> Batch:
        """Return the cropped, normalised batch; a mask, if any, is cropped with its picture."""
        x = stack_mask(batch)
        boxes = random_boxes(len(x), self.scale, self.ratio)
        boxes = flip_boxes(boxes, *random_flips(len(x), self.flip, self.vertical))
        return unstack(batch, crop_resize(x, boxes, self.size), self.colour)


class Move(NamedTuple):
    """Where each picture of a batch goes: through its matrix (b, 2, 3) where `warped` (b,), else its box (b, 4)."""

    warped: Tensor
    matrices: Tensor
    boxes: Tensor

    def __call__(self, x: Tensor, size: int) -> Tensor:
        """Return `x` (b, k, h, w), whatever its resolution, moved to (b, k, size, size)."""
        if self.warped.all():
            return warp(x, self.matrices, size)
        if not self.warped.any():
            return crop_resize(x, self.boxes, size)
        out = x.new_empty(len(x), x.shape[1], size, size)
        for chosen, move, numbers in ((self.warped, warp, self.matrices), (~self.warped, crop_resize, self.boxes)):
            rows = chosen.nonzero().squeeze(1).to(x.device)
            out[rows] = move(x[rows], numbers[chosen], size)
        return out


@dataclass(frozen=True)
class SegmentViews:
    """Flips, an affine map with probability `geometric`, and colour; the mask moves with its picture. Values are ours.

    The affine map draws an angle within +-`rotate` degrees, a log-uniform enlargement from `scale`, a shear within
    +-`shear` degrees and a shift within +-`translate` of the side. Picture and mask are sampled bilinearly through the
    same grid and mirrored at the edges; the mask stays in [0, 1]. A picture without affine map is resized with
    antialiasing, as `PlainViews` does. Colour runs after geometry and leaves the mask alone.
    """

    size: int
    flip: bool = True
    vertical: bool = True
    rotate: float = 180.0
    scale: tuple[float, float] = (0.8, 1.25)
    translate: float = 0.1
    shear: float = 8.0
    geometric: float = 0.8
    colour: Picture | None = DERMOSCOPY_COLOUR

    def __post_init__(self) -> None:
        check_range("scale", self.scale)

    @classmethod
    def flips_only(cls, size: int) -> SegmentViews:
        """Return views that mirror, and do nothing else at random."""
        return cls(size, geometric=0.0, colour=None)

    @classmethod
    def xray(cls, size: int) -> SegmentViews:
        """Return views that are safe for radiographs: upright, at most 10 degrees off, brightness and contrast."""
        return cls(size, vertical=False, rotate=10.0, translate=0.05, shear=4.0, colour=XRAY_COLOUR)

    def __call__(self, batch: Batch) -> Batch:
        """Return the augmented, normalised batch."""
        move = self._draw(len(batch.image))
        features = [move(feature.float(), feature.shape[-1]) for feature in batch.features]
        return unstack(replace(batch, features=features), move(stack_mask(batch), self.size), self.colour)

    def _draw(self, num: int) -> Move:
        flips = random_flips(num, self.flip, self.vertical)
        matrices = self._draw_matrices(num, torch.stack(flips, 1))
        return Move(draw_each(num, torch.rand) < self.geometric, matrices, flip_boxes(whole_boxes(num), *flips))

    def _draw_matrices(self, num: int, flips: Tensor) -> Tensor:
        angle = uniform(num, -self.rotate, self.rotate)
        scale = self.scale[0] * (self.scale[1] / self.scale[0]) ** draw_each(num, torch.rand)
        shear = uniform(num, -self.shear, self.shear)
        shift = draw_each(num, lambda n: torch.empty(n, 2).uniform_(-self.translate, self.translate))
        return affine(angle, scale, shear, shift, 1 - 2 * flips.float())


def segment_views(augment: Augment, size: int) -> Views:
    """Return the augmentation of pictures with their masks that a recipe names, to `size` pixels a side.

    "full" is flips, affine maps and colour (dermoscopy and photographs), "xray" upright and gray, "flips" mirroring
    alone, "none" a plain resize.
    """
    if augment == "none":
        return PlainViews(size)
    return {"full": SegmentViews, "flips": SegmentViews.flips_only, "xray": SegmentViews.xray}[augment](size)

"""Views of the methods that look at an image more than once: colour pairs of one crop, several crops, label maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewmask.data.augment import stack_mask, unstack
from fewmask.data.colour import Chain, ColourJitter, GaussianBlur, Picture, RandomGrayscale, apply_to_some
from fewmask.data.geometry import check_area, check_range, crop_resize, flip_boxes, random_boxes, random_flips
from fewmask.data.preprocess import normalise
from fewmask.types import Batch

SSL_COLOUR = Chain((ColourJitter(0.4, 0.4, 0.2, 0.1, 0.8), RandomGrayscale(0.2), GaussianBlur((0.1, 2.0), 0.5)))
"""Colour jitter, random grayscale and blur (paper: G2LL names the three) with DINO's values (its local views').

The blur is in pixels, whatever the view: to one of 64 pixels it is 3.5 times what it is to DINO's of 224 (LOG.md).
"""


def move_map(labels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return the boxes of label maps (b, 1, h, w) as (b, 1, size, size): the label at the middle of each new pixel.

    `boxes` (b, 4) as `crop_resize` takes them, mirrored ones included; labels are never mixed.
    """
    left, right, top, bottom = boxes.to(labels.device).unbind(1)
    rows = nearest_index(top, bottom, labels.shape[2], size)
    columns = nearest_index(left, right, labels.shape[3], size)
    flat = (rows[:, :, None] * labels.shape[3] + columns[:, None, :]).flatten(1)
    return labels.flatten(1).gather(1, flat).view(len(labels), 1, size, size)


def nearest_index(start: Tensor, end: Tensor, num_in: int, num_out: int) -> Tensor:
    """Return the indices int64 (b, num_out) of the input pixels under the middles of the output pixels."""
    middle = (torch.arange(num_out, device=start.device) + 0.5) / num_out
    position = start[:, None] + (end - start)[:, None] * middle
    return (position * num_in).floor().long().clamp(0, num_in - 1)


@dataclass(frozen=True)
class CropViews:
    """Random resized crop and flips as `PretrainViews`, which also move `extra["superpixels"]`, if it is there.

    With `pair`, `extra["second"]` is the same crop under a second draw of the colour augmentation (paper, G2LL: two
    views by colour; that they show one crop is ours). Ours too: crops are cut from the cached picture, an eighth larger
    than the network's, so that most are enlarged (at this scale by 1.3 on average); the papers' from the photo.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    vertical: bool = True
    colour: Picture | None = None
    pair: bool = False

    def __post_init__(self) -> None:
        check_area("crop_scale", self.scale)
        check_range("ratio", self.ratio)

    def __call__(self, batch: Batch) -> Batch:
        """Return the cropped, normalised batch."""
        x = stack_mask(batch)
        boxes = random_boxes(len(x), self.scale, self.ratio)
        boxes = flip_boxes(boxes, *random_flips(len(x), self.flip, self.vertical))
        cropped = crop_resize(x, boxes, self.size).clamp_(0, 1)
        extra = dict(batch.extra)
        if "superpixels" in extra:
            extra["superpixels"] = move_map(extra["superpixels"], boxes, self.size)
        if self.pair:
            extra["second"] = normalise(cropped[:, :3] if self.colour is None else self.colour(cropped[:, :3]))
        return replace(unstack(batch, cropped, self.colour), extra=extra)


@dataclass(frozen=True)
class Solarise:
    """Invert the values of at least one half with probability `p` (BYOL, DINO)."""

    p: float = 0.2

    def __call__(self, x: Tensor) -> Tensor:
        """Return the pictures, some of them solarised."""
        return apply_to_some(x, self.p, lambda some: torch.where(some < 0.5, some, 1 - some))


def dino_colour(blur: float, solarise: float = 0.0) -> Chain:
    """Return DINO's colour augmentation: jitter .4/.4/.2/.1 with p .8, gray .2, and blur and solarisation as given."""
    jitter = ColourJitter(0.4, 0.4, 0.2, 0.1, 0.8)
    return Chain((jitter, RandomGrayscale(0.2), GaussianBlur((0.1, 2.0), blur), Solarise(solarise)))


@dataclass(frozen=True)
class MultiCropViews:
    """Two large crops and any number of small ones, each with geometry and colour of its own (DINO).

    `image` is the first global crop, `extra["second"]` the other, `extra["local"]` (b, num_local, 3, l, l) the small
    ones, if any. Code (DINO): global blur p 1.0 and 0.1, solarise 0.2 on the second, local blur p 0.5. Ours:
    `vertical`, and that a mask, if there is one, is left behind.
    """

    size: int
    scale: tuple[float, float] = (0.4, 1.0)
    num_local: int = 0
    local_size: int = 0
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: bool = True
    vertical: bool = True

    def __post_init__(self) -> None:
        check_area("crop_scale", self.scale)
        check_area("local_scale", self.local_scale)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch of crops; it has no mask."""
        x = stack_mask(replace(batch, mask=None))
        first = self._crop(x, self.scale, self.size, dino_colour(1.0))
        extra = {**batch.extra, "second": self._crop(x, self.scale, self.size, dino_colour(0.1, 0.2))}
        if self.num_local:
            small = [self._crop(x, self.local_scale, self.local_size, dino_colour(0.5)) for _ in range(self.num_local)]
            extra["local"] = torch.stack(small, 1)
        return replace(batch, image=first, mask=None, extra=extra)

    def _crop(self, x: Tensor, scale: tuple[float, float], size: int, colour: Picture) -> Tensor:
        boxes = flip_boxes(random_boxes(len(x), scale, (3 / 4, 4 / 3)), *random_flips(len(x), self.flip, self.vertical))
        return normalise(colour(crop_resize(x, boxes, size).clamp_(0, 1)))

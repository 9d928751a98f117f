"""The one place where an image becomes what a segmenter sees, and its logits become a probability map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch is imported inside the functions: the processes that build a cache need only the two resizers.

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Return the image as uint8 (size, size, 3), the aspect ratio not kept.

    `image` is uint8 (h, w, 3). The filter is Pillow's BILINEAR, a triangle as wide as the reduction asks, which is what
    torch's `interpolate(mode="bilinear", antialias=True)` and ONNX Resize with antialias=1 compute in floats.
    """
    return np.array(_resize(Image.fromarray(image), size))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the share of foreground under each pixel, uint8 (size, size) in 0..255, from a bool (h, w) mask.

    Enlarged and reduced by the filter of `resize_image`, so image and mask stay aligned to a fraction of a pixel.
    """
    coverage = np.multiply(mask, np.uint8(255), dtype=np.uint8)
    return np.array(_resize(Image.fromarray(coverage), size))


def _resize(picture: Image.Image, size: int) -> Image.Image:
    # Width first, always: Pillow rounds after each pass, and its versions order the passes differently.
    wide = picture.resize((size, picture.height), Image.Resampling.BILINEAR)
    return wide.resize((size, size), Image.Resampling.BILINEAR)


def normalise(image: Tensor) -> Tensor:
    """Return float32 of zero mean and unit variance over ImageNet, (..., 3, h, w), from uint8 or floats in [0, 1]."""
    import torch

    scaled = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return (scaled - _channels(MEAN, scaled)) / _channels(STD, scaled)


def denormalise(image: Tensor) -> Tensor:
    """Return the picture in [0, 1], clamped, (..., 3, h, w), from what `normalise` returned."""
    return (image.float() * _channels(STD, image) + _channels(MEAN, image)).clamp(0, 1)


def predict_probability(segmenter: nn.Module, image: np.ndarray, size: int, device: str = "cpu") -> np.ndarray:
    """Return the foreground probability float32 (h, w) in [0, 1] of one uint8 (h, w, 3) image.

    Resize to (size, size), normalise, segment, bring the logits back to (h, w) bilinearly without antialiasing, then
    the sigmoid: the order the exported model follows too. The segmenter is run as it is: put it in eval mode first.
    """
    import torch
    from torch.nn import functional as F

    pixels = torch.from_numpy(resize_image(image, size)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        logits = segmenter(normalise(pixels.to(device))).logits.float()
        native = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False, antialias=False)
        return native.sigmoid()[0, 0].cpu().numpy()


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=like.device).view(3, 1, 1)

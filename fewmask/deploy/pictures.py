"""What a mask looks like on disk and on a screen: PNG, overlay, and its area."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fewmask.types import UserError

COLOUR = (0, 220, 190)
TINT = 0.22
MADE_BY = ("Software", "fewmask")


def mask_png(mask: NDArray[np.bool_]) -> bytes:
    """Return a PNG of 0 and 255, one channel, at the mask's own size (h, w), which says that fewmask wrote it."""
    made_by = PngInfo()
    made_by.add_text(*MADE_BY)
    return _encode(Image.fromarray(mask.astype(np.uint8) * 255), "PNG", pnginfo=made_by)


def is_ours(path: Path) -> bool:
    """Return whether a file is a mask that `mask_png` made."""
    try:
        with Image.open(path) as image:
            return image.info.get(MADE_BY[0]) == MADE_BY[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def overlay_jpeg(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
    """Return a JPEG of the RGB image (h, w, 3) with the mask's contour drawn and its inside softly tinted.

    Raises UserError where a side is longer than a JPEG can hold (65,500 pixels).
    """
    drawn = image.copy()
    colour = np.array(COLOUR, np.float32)
    drawn[mask] = (image[mask] * (1 - TINT) + colour * TINT).astype(np.uint8)
    drawn[contour(mask, max(1, round(min(mask.shape) / 250)))] = COLOUR
    try:
        return _encode(Image.fromarray(drawn), "JPEG", quality=90)
    except (OSError, ValueError):
        height, width = mask.shape
        raise UserError(f"{width} x {height} pixels do not fit into a JPEG; leave the overlay out.") from None


def contour(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Return the mask's pixels within `width` steps (4-neighbourhood) of its outside; beyond the image is none."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def describe_mask(probability: NDArray[np.float32], threshold: float) -> dict[str, Any]:
    """Return the mask's size in pixels, its area in pixels and percent, and the mean probability inside it.

    `mean_probability_inside` is None where the mask is empty.
    """
    mask = probability >= threshold
    area = int(mask.sum())
    return {
        "height": mask.shape[0],
        "width": mask.shape[1],
        "area_px": area,
        "area_percent": 100.0 * area / mask.size,
        "mean_probability_inside": float(probability[mask].mean(dtype=np.float64)) if area else None,
        "threshold": threshold,
    }


def _encode(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()

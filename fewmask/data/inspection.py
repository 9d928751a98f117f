"""What one case's two files hold, measured in one reading of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewmask.data.hashing import Sketch, sketch
from fewmask.data.reading import read_image, read_mask
from fewmask.types import Case, UserError

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of a case.

    `size` (h, w) and `sketch` are those of the image, None where it cannot be read; `mask_fraction` is the foreground's
    share, None without a readable mask; `errors` are (code, sentence).
    """

    size: Size | None = None
    sketch: Sketch | None = None
    constant: bool = False
    mask_fraction: float | None = None
    remarks: tuple[str, ...] = ()
    errors: tuple[tuple[str, str], ...] = ()


def inspect(case: Case) -> Facts:
    """Read a case's image and mask and return what they hold; what is wrong with them is told, not raised."""
    errors: list[tuple[str, str]] = []
    size, small, constant, fraction = None, None, False, None
    remarks: tuple[str, ...] = ()
    try:
        image = read_image(case.image)
        size, small = (image.shape[0], image.shape[1]), sketch(image)
        constant = bool((image == image[0, 0]).all()) if np.ptp(small.full) == 0 else False
        del image
    except UserError as error:
        errors.append(("unreadable-image", str(error)))
    if case.mask is not None:
        try:
            reading = read_mask(case.mask)
            fraction, remarks = float(reading.mask.mean()), reading.remarks
            if size is not None and reading.mask.shape != size:
                errors.append(("size-mismatch", _mismatch(case, size, reading.mask.shape)))
        except UserError as error:
            errors.append(("unreadable-mask", str(error)))
    return Facts(size, small, constant, fraction, remarks, tuple(errors))


def _mismatch(case: Case, image: Size, mask: Size) -> str:
    """Return a sentence on a mask (h, w) that does not fit its image (h, w), with the likely reason."""
    fact = f"'{case.mask}' is {mask[1]} x {mask[0]} pixels and its image '{case.image}' is {image[1]} x {image[0]}"
    if max(abs(mask[0] - image[0]), abs(mask[1] - image[1])) == 1:
        return f"{fact}: off by one pixel, often from rounding; pad or crop the mask to the image's size."
    if mask == image[::-1]:
        return f"{fact}: transposed, or drawn before the image was turned upright; turn the mask."
    if abs(mask[0] * image[1] - mask[1] * image[0]) <= max(*mask, *image):
        return f"{fact}: the same proportions at another scale; resize one of them to the other."
    return f"{fact}: the proportions differ, so they may not belong together; check the pair."

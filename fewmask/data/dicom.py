"""DICOM files as 8-bit RGB; pydicom is imported only when one is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fewmask.types import UserError


def read_dicom(path: Path, max_pixels: int) -> np.ndarray:
    """Return a single-frame DICOM image as uint8 (h, w, 3), windowed as the file asks.

    Grey data go through the modality LUT or rescale and then the VOI LUT or window (DICOM PS3.3 C.11.1 and C.11.2, by
    pydicom); the window's own range becomes 0..255. Without a window 8-bit data stay as they are and anything deeper is
    stretched from its minimum to its maximum (our choice). MONOCHROME1 is inverted. Raises UserError for multi-frame,
    oversized, damaged or pixel-less files, and where pydicom is missing.
    """
    dataset = _open(path, header_only=False)
    _check_frame(path, dataset, max_pixels)
    try:
        return _to_rgb(dataset)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{path}' is a DICOM file whose pixels cannot be decoded ({reason}); save it uncompressed or as PNG."
        ) from None


def dicom_size(path: Path) -> tuple[int, int]:
    """Return (h, w) from the header of a DICOM image."""
    dataset = _open(path, header_only=True)
    _check_frame(path, dataset, None)
    return int(dataset.Rows), int(dataset.Columns)


def _open(path: Path, header_only: bool) -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            f"'{path}' is a DICOM file and pydicom is not installed: run `pip install fewmask[dicom]`."
        ) from None
    try:
        return pydicom.dcmread(path, stop_before_pixels=header_only)
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, AttributeError, LookupError, RuntimeError):
        raise UserError(f"'{path}' is not a readable DICOM file; export it again or remove it.") from None


def _check_frame(path: Path, dataset: Any, max_pixels: int | None) -> None:
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise UserError(f"'{path}' is a DICOM file without an image; remove it.")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise UserError(f"'{path}' holds {dataset.NumberOfFrames} frames; save the one you want as a file of its own.")
    if max_pixels is not None and dataset.Rows * dataset.Columns > max_pixels:
        raise UserError(
            f"'{path}' is {dataset.Columns} x {dataset.Rows} pixels, more than the {max_pixels // 10**6} million "
            "that are read; reduce or tile it."
        )


def _to_rgb(dataset: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    pixels = dataset.pixel_array
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.ndim == 3:
        depth = 16 if kind == "PALETTE COLOR" and pixels.dtype == np.uint16 else int(dataset.BitsStored)
        return np.rint(pixels[..., :3] * (255 / (2**depth - 1))).astype(np.uint8)
    grey = _window(apply_modality_lut(pixels, dataset), dataset)
    if kind == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=2)


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Return uint8 grey from modality values, the output range of the VOI transform mapped to 0..255."""
    from pydicom.pixels.processing import apply_voi_lut

    if "VOILUTSequence" in dataset:
        low, high = 0.0, 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
        values = apply_voi_lut(np.rint(values).astype(np.int64), dataset)
    elif dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        # What the window makes of values far outside it is its output range, whatever the function and the bit depth.
        with np.errstate(over="ignore"):
            low, high = map(float, apply_voi_lut(np.array([-1e9, 1e9]), dataset))
            values = apply_voi_lut(values.astype(np.float64), dataset)
    elif values.dtype == np.uint8:
        return values
    else:
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros(values.shape)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)

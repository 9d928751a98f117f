"""Image and mask files as arrays: every format, depth and defect a user's folder may hold, and no warning let out."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fewmask.data import dicom
from fewmask.types import UserError

MAX_PIXELS = 150_000_000
"""Largest image read, from the header alone: 12,000 x 12,500. Below Pillow's own bound, so that this one decides."""

PICTURE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif", ".dcm", ".dicom",
})  # fmt: skip

# What Pillow and tifffile are known to raise on damaged files; anything else is a defect of this program.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

_DEPTHS = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
"""White in 8, 10, 12, 14 and 16 bits: what sensors write into 16-bit files."""

_NEAR = 32
"""A grey value of a mask this close to black or white counts as it (our choice: JPEG noise stays within)."""


@dataclass(frozen=True, slots=True)
class MaskReading:
    """A mask, bool (h, w), and what had to be done to the file to get it.

    A remark starts with a stable code: "values 0/V", "inverted", "inverted?" (only suspected, left as it is),
    "thresholded", "alpha", "empty", "full".
    """

    mask: np.ndarray
    remarks: tuple[str, ...] = ()


def read_image(path: Path) -> np.ndarray:
    """Return the image as uint8 RGB (h, w, 3), upright as its EXIF orientation says.

    Grey is repeated; CMYK and palettes are converted; transparency is laid over white; ICC profiles are not applied.
    Integers deeper than 8 bits are divided by the least of 255, 1023, 4095, 16383 and 65535 that holds the image's
    maximum, so 8- to 14-bit data in a 16-bit file keep their contrast; floats within [0, 1] are taken as such; other
    floats, signed and wider integers are stretched from minimum to maximum (our choices). DICOM is windowed (see
    `read_dicom`). Raises UserError for what is missing, empty, no image, damaged, animated or multi-page, holds NaN, is
    a 16-bit colour PNG that uses 14 bits or fewer (its lower byte cannot be had), or has more than MAX_PIXELS (told
    from the header, before anything is decoded). A phone's multi-picture JPEG (MPO) gives its first.
    """
    path = Path(path)
    if _is_dicom(path, _head(path)):
        with _quiet():
            return dicom.read_dicom(path, MAX_PIXELS)
    with _opened(path) as picture:
        if _is_deep_colour(picture):
            return _read_deep_colour(path, picture)
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith(("I", "F")):
            return np.repeat(_to_eight_bits(path, _deep_grey(picture))[..., None], 3, axis=2)
        return np.array(_flatten(picture))


def read_mask(path: Path) -> MaskReading:
    """Return a file's foreground as bool (h, w), upright, with remarks on what was done to it.

    Two values {0, v} are background and foreground, whatever v is; a single value is an empty or a full mask. A mask
    whose whole border is foreground around a background of at least 1 % of its area is taken as inverted; with less
    background that is only remarked on. Grey ramps
    from antialiasing and JPEG are cut at half when nine pixels in ten lie within 32 of black or white and the others
    along the edge (our choices). Where all colours are equal, transparency is the mask; else it is background. Raises
    UserError for colours, several grey levels (classes) and what `read_image` refuses.
    """
    path = Path(path)
    if _is_dicom(path, _head(path)):
        raise UserError(f"'{path}' is a mask in DICOM, which is not read; save it as a black and white PNG.")
    with _opened(path) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode == "1":
            return _with_orientation(np.array(picture), [])
        grey, remarks = _mask_grey(path, picture)
    return _with_orientation(*_binarise(path, grey, remarks))


def image_size(path: Path) -> tuple[int, int]:
    """Return (h, w) of the image as `read_image` would give it, from the header alone."""
    path = Path(path)
    if _is_dicom(path, _head(path)):
        with _quiet():
            return dicom.dicom_size(path)
    with _opened(path) as picture:
        width, height = picture.size
        if picture.format == "TIFF" or (picture.format == "PNG" and not _png_has_exif(path)):
            # Pillow swaps a TIFF's sides when it opens it, and decodes a whole PNG to look for EXIF behind the pixels.
            return height, width
        turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


def is_picture(path: Path) -> bool:
    """Tell by its suffix, or by DICOM's magic where the suffix is unknown, whether a file is meant to be an image."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_filters: warnings.catch_warnings | None = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the decoders' warnings; counted, since `catch_warnings` alone corrupts the filters across threads."""
    global _quiet_depth, _quiet_filters
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"(PIL|pydicom|tifffile|fewmask\.data\.(reading|dicom))")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and _quiet_filters is not None:
                _quiet_filters.__exit__(None, None, None)


def _head(path: Path) -> bytes:
    """Return the first 512 bytes, or raise UserError where there is nothing to read."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; check the name.") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder, not an image; name a file.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be opened ({error.strerror}); check its permissions.") from None
    if not head:
        raise UserError(f"'{path}' is empty (0 bytes); copy or download it again.")
    _refuse_by_content(path, head)
    return head


def _refuse_by_content(path: Path, head: bytes) -> None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise UserError(f"'{path}' is a web page, not an image: the download failed; download it again.")
    if start.startswith((b"<?xml", b"<svg", b"<error")):
        raise UserError(f"'{path}' is XML or SVG, not a pixel image; save it as PNG.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"'{path}' is a Git LFS pointer, not an image; run `git lfs pull`.")


def _is_dicom(path: Path, head: bytes) -> bool:
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image lazily, refuse it by its header, and turn whatever decoding raises into a UserError."""
    with _quiet():
        try:
            with Image.open(path) as picture:
                _check_header(path, picture)
                yield picture
        except UnidentifiedImageError:
            if _is_tiff(path):
                raise UserError(
                    f"'{path}' is a TIFF whose header is damaged or whose pixels are of a kind that is not read "
                    "(64-bit numbers, floats in colour); save it with 8 or 16 bits a channel."
                ) from None
            raise UserError(
                f"'{path}' is not an image this program can read, or its header is damaged; "
                "save it as PNG or JPEG, or remove it."
            ) from None
        except Image.DecompressionBombError:
            raise UserError(
                f"'{path}' has more than the {MAX_PIXELS // 10**6} million pixels that are read; reduce or tile it."
            ) from None
        except _DECODE_ERRORS as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"'{path}' is damaged or cut short ({reason}); copy or download it again.") from None


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _check_header(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"'{path}' is {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million that are read; "
            "reduce or tile it."
        )
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise UserError(f"'{path}' holds several pages or frames; save the one you want as a file of its own.")


def _png_has_exif(path: Path) -> bool:
    """Walk over a PNG's chunks, reading their heads only."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(30)) >= 8:
            length, kind = struct.unpack(">I4s", head[:8])
            if kind == b"eXIf" or head[8:].startswith(b"Raw profile type exif"):
                return True
            file.seek(length + 12 - len(head), 1)
    return False


def _flatten(picture: Image.Image) -> Image.Image:
    """Return RGB with any transparency laid over white."""
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _deep_grey(picture: Image.Image) -> np.ndarray:
    """Return the numbers of a deep grey picture; Pillow turns white-is-zero round in 8 bits but not in 16."""
    values = np.asarray(picture)
    white_is_zero = picture.format == "TIFF" and picture.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    return 65535 - values if white_is_zero and values.dtype.kind == "u" and values.dtype.itemsize == 2 else values


def _to_eight_bits(path: Path, values: np.ndarray) -> np.ndarray:
    """Return uint8 of the same shape, scaled by the rule `read_image` states."""
    if not np.isfinite(values).all():
        raise UserError(f"'{path}' holds NaN or infinite values; replace them.")
    low, high = float(values.min()), float(values.max())
    integer = values.dtype.kind in "iu"
    if not integer and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif integer and low >= 0 and high <= 65535:
        low, high = 0.0, next(top for top in _DEPTHS if high <= top)
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _is_deep_colour(picture: Image.Image) -> bool:
    """Tell whether a colour image has more than 8 bits a channel, of which Pillow would drop the lower."""
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return len(bits) > 1 and max(bits) > 8
    tiles = getattr(picture, "tile", None)
    args = tiles[0].args if tiles else None
    rawmode = args if isinstance(args, str) else (args[0] if isinstance(args, tuple) and args else "")
    return picture.mode in ("RGB", "RGBA", "LA") and ";16" in str(rawmode)


def _read_deep_colour(path: Path, picture: Image.Image) -> np.ndarray:
    if picture.format == "TIFF":
        return _read_deep_tiff(path)
    ImageOps.exif_transpose(picture, in_place=True)
    pixels = np.asarray(picture)
    colour = pixels[..., : {"RGB": 3, "RGBA": 3, "LA": 1}[picture.mode]]
    # Pillow kept the upper byte, which is division by 257 to within one level; only data below 2 ** 14 need the lower.
    if colour.max() < 2**14 // 256:
        raise UserError(f"'{path}' is 16-bit colour with values in the lowest 14 bits only; save it as 8-bit PNG.")
    return np.array(_flatten(picture))


def _read_deep_tiff(path: Path) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        values = page.asarray()
        orientation = int(page.tags[274].value) if 274 in page.tags else 1
        if int(page.planarconfig) == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[2] not in (2, 3, 4):
        raise UserError(f"'{path}' has {values.shape[-1]} channels; save it as RGB.")
    num_colours = 3 if values.shape[2] >= 3 else 1
    layers = _to_eight_bits(path, values[..., :num_colours])
    if num_colours == 1:
        layers = np.repeat(layers, 3, axis=2)
    picture = Image.fromarray(layers)
    if values.shape[2] != num_colours:
        picture.putalpha(Image.fromarray(_deep_alpha(path, values[..., -1])))
    picture.getexif()[0x0112] = orientation
    return np.array(_flatten(ImageOps.exif_transpose(picture)))


def _deep_alpha(path: Path, alpha: np.ndarray) -> np.ndarray:
    """Return opacity as uint8; opaque is the type's own maximum, whatever depth the colours use."""
    if alpha.dtype.kind != "u":
        return _to_eight_bits(path, alpha)
    return (alpha >> (8 * (alpha.dtype.itemsize - 1))).astype(np.uint8)


def _mask_grey(path: Path, picture: Image.Image) -> tuple[np.ndarray, list[str]]:
    """Return one number a pixel, 0 being background, and remarks; refuse colours."""
    if picture.mode.startswith(("I", "F")):
        return _deep_grey(picture), []
    if picture.has_transparency_data:
        return _alpha_grey(path, np.asarray(picture.convert("RGBA")))
    if picture.mode in ("L", "LA"):
        return np.asarray(picture.convert("L")), []
    return _colour_grey(path, np.asarray(picture.convert("RGB"))), []


def _alpha_grey(path: Path, pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    colour, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min() == 255:
        return _colour_grey(path, colour), []
    if alpha.any() and (colour[alpha > 0] == colour[alpha > 0][0]).all():
        return alpha, ["alpha: the transparency was taken as the mask"]
    grey = _colour_grey(path, np.where(alpha[..., None] > 0, colour, np.uint8(0)))
    return np.minimum(grey, alpha), ["alpha: transparent pixels were taken as background"]


def _colour_grey(path: Path, colour: np.ndarray) -> np.ndarray:
    """Return the one channel of a grey picture or of black with one other colour."""
    # A JPEG's chroma may stray by a few levels on a picture that was grey.
    if np.ptp(colour, axis=2).max() <= 8:
        return colour[..., 1]
    top = colour.max(axis=2)
    drawn = colour[top > 0]
    if top.min() == 0 and (drawn == drawn[0]).all():
        return top
    raise UserError(f"'{path}' is a mask in several colours; save one black and white mask per structure.")


def _binarise(path: Path, grey: np.ndarray, remarks: list[str]) -> tuple[np.ndarray, list[str]]:
    values = np.flatnonzero(np.bincount(grey.ravel())) if grey.dtype == np.uint8 else np.unique(grey)
    if not np.isfinite(values).all() or values[0] < 0:
        raise UserError(f"'{path}' is a mask with negative or non-finite values; save it as black and white PNG.")
    low, high = values[0], values[-1]
    if len(values) == 1 or (len(values) == 2 and low == 0):
        if high not in (0, 255):
            remarks.append(f"values 0/{high:g}: taken as background and foreground")
        return grey > 0, remarks
    scale = 1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0
    levels = grey if grey.dtype == np.uint8 else np.rint(grey * (255.0 / scale)).clip(0, 255).astype(np.uint8)
    mask = levels >= 128
    if not _is_ramp(levels, mask, tolerance=2 if len(values) > 16 else 0):
        listed = ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")
        raise UserError(
            f"'{path}' is a mask with {len(values)} grey levels ({listed}), not two: "
            "save one black and white mask per structure."
        )
    return mask, [*remarks, f"thresholded: {len(values)} grey levels were cut at half"]


def _is_ramp(levels: np.ndarray, mask: np.ndarray, tolerance: int) -> bool:
    """Tell an antialiased or JPEG-compressed binary mask from one that holds classes, instances or a soft map.

    Nine pixels in ten are near black or white, and those more than `tolerance` levels off lie, save one in twenty,
    within 8 pixels (a JPEG block) or 2 % of the long side (an enlarged mask) of the thresholded edge. JPEG strays by a
    level or two in flat parts and makes many levels; where there are few, a level next to black is a class.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    dark, light = levels <= _NEAR, levels >= 255 - _NEAR
    if not (dark.any() and light.any()) or (dark | light).mean() < 0.9:
        return False
    off = (levels > tolerance) & (levels < 255 - tolerance)
    width = 2 * max(8, round(0.02 * max(mask.shape))) + 1
    along_edge = maximum_filter(mask, width) != minimum_filter(mask, width)
    return not off.any() or float(along_edge[off].mean()) >= 0.95


def _with_orientation(mask: np.ndarray, remarks: list[str]) -> MaskReading:
    """Turn an inverted mask round, and remark on those that may be, on empty and on full ones."""
    border = mask[0].all() and mask[-1].all() and mask[:, 0].all() and mask[:, -1].all()
    if border and 1 - mask.mean() >= 0.01:
        mask, remarks = ~mask, [*remarks, "inverted: its border is foreground all round; it was turned round"]
    elif border and not mask.all():
        remarks = [*remarks, "inverted?: all is foreground but for a speck inside; invert the file if that is wrong"]
    if not mask.any():
        remarks = [*remarks, "empty: no pixel is foreground"]
    elif mask.all():
        remarks = [*remarks, "full: every pixel is foreground"]
    return MaskReading(mask, tuple(remarks))

"""Embed pictures in the page and draw the outlines of masks over them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from skimage.measure import approximate_polygon, find_contours

from fewmask.report.wording import title
from fewmask.types import UserError

MAX_SIDE = 480
TILE_SIDE = 240
JPEG_QUALITY = 80
NUM_PREVIEWS = 6
PREVIEW_ORDER = ("original", "image", "input", "masked", "reconstruction")
STRIPS: dict[str, dict[int, tuple[str, ...]]] = {
    "reconstruction": {
        3: ("Image", "Masked", "Reconstruction"),
        4: ("Image", "Superpixels", "Masked", "Reconstruction"),
    },
    "conversion": {5: ("Image", "Converted", "Again", "Again", "Again")},
    "crops": {2: ("First crop", "Second crop")},
    "figure": {3: ("Image", "Found", "Predicted")},
    "teacher_and_student": {3: ("Image", "Teacher", "Student")},
}
NOTES = {
    "reconstruction": "The encoder sees what is left of the image; what was hidden is painted in from that.",
    "conversion": "The same image in other exteriors: its structure stays, its colours and textures do not.",
    "crops": "Two crops of one image: what the teacher says of one is what the student should say of the other.",
    "figure": "What a threshold on the image's colours set apart (black: nothing), and what the network makes of it.",
    "teacher_and_student": "Training images as the networks see them; the redder, the surer of what is sought.",
    "augmented": "The images as the encoder sees them.",
}
KINDS = ("best", "median", "worst")


def contour_path(mask: NDArray[np.bool_], width: float, height: float, tolerance: float = 0.35) -> str:
    """Return the outline of a mask (h, w) as an SVG path in a `width` by `height` picture.

    Every sub-path closes and lies within the picture: the mask is padded with background, so that a region at the
    border is closed along it. Points are thinned to `tolerance` mask pixels (Douglas-Peucker).
    """
    scale = np.array([height / mask.shape[0], width / mask.shape[1]])
    pieces = []
    for ring in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        # Padding moves pixel centres by one; SVG measures from a pixel's corner, half a pixel before its centre.
        points = (_thinned(ring, tolerance)[:-1] - 0.5) * scale
        points = np.clip(points, 0, [height, width])
        pieces.append("M" + "L".join(f"{_short(x)} {_short(y)}" for y, x in points) + "Z")
    return "".join(pieces)


def data_uri(path: Path, max_side: int = MAX_SIDE) -> tuple[str, int, int]:
    """Return a picture as a JPEG data URI without its metadata, at most `max_side` long, with its width and height."""
    return _embedded(_open(path).convert("RGB"), max_side)


def _embedded(picture: Image.Image, max_side: int) -> tuple[str, int, int]:
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *picture.size


def case_pictures(folder: Path, index: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a case, best first: data URI, size, outlines of truth and prediction, name and Dice.

    Raises UserError when the index names a file that is missing, outside the folder, or no picture.
    """
    known = [e for e in index if e["kind"] in KINDS]
    ordered = sorted(known, key=lambda e: (KINDS.index(e["kind"]), e.get("rank", 0)))
    return [_case(folder, entry) for entry in ordered]


def previews(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the first few pre-training previews in groups: title, note, and rows of pictures with their captions.

    Files are called NAME_NUMBER.png. Those that are a strip of square pictures are taken apart and stand in a group of
    their name; the others of one number belong together, in the order in which a method shows them: what went in, what
    was hidden, what came out.
    """
    groups: dict[str, dict[str, list[tuple[str, Path]]]] = {}
    for path in paths:
        name, _, index = path.stem.rpartition("_")
        name, index = (name, index) if name else (path.stem, "")
        group = groups.setdefault(name if name in STRIPS and _num_tiles(path) > 1 else "", {})
        group.setdefault(index, []).append((name, path))
    return [_group(name, list(rows.values())[:NUM_PREVIEWS]) for name, rows in sorted(groups.items(), key=_shown_order)]


def _group(name: str, rows: list[list[tuple[str, Path]]]) -> dict[str, Any]:
    if name:
        return {"title": title(name), "note": NOTES[name], "rows": [_strip(name, path) for [(_, path)] in rows]}
    shown = [[_preview(*item) for item in sorted(row, key=_shown_order)] for row in rows]
    names = {only for row in rows for only, _ in row}
    only = names.pop() if len(names) == 1 else ""
    return {"title": title(only) if only else "", "note": NOTES.get(only, ""), "rows": shown}


def _shown_order(item: tuple[str, Any]) -> tuple[int, str]:
    return (PREVIEW_ORDER.index(item[0]) if item[0] in PREVIEW_ORDER else len(PREVIEW_ORDER), item[0])


def _num_tiles(path: Path) -> int:
    width, height = _open(path).size
    return width // height if width % height == 0 else 1


def _strip(name: str, path: Path) -> list[dict[str, Any]]:
    """Return the square pictures of a strip, each with its caption, if it is known by its number of pictures."""
    strip = _open(path).convert("RGB")
    side, num = strip.height, strip.width // strip.height
    captions = STRIPS[name].get(num, ("",) * num)
    tiles = [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(num)]
    return [_picture(caption, _embedded(tile, TILE_SIDE)) for caption, tile in zip(captions, tiles, strict=True)]


def _preview(name: str, path: Path) -> dict[str, Any]:
    return _picture(title(name), data_uri(path, TILE_SIDE))


def _picture(name: str, embedded: tuple[str, int, int]) -> dict[str, Any]:
    uri, width, height = embedded
    return {"name": name, "uri": uri, "width": width, "height": height}


def inside(folder: Path, name: str, index: str) -> Path:
    """Return the path of a file that `index` names, or raise a UserError where it lies outside its folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / index} names {name}, which lies outside its folder; make the run again.")
    return path


def _case(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    uri, width, height = data_uri(_inside(folder, entry["image"]))
    outlines = {
        which: contour_path(_read_mask(_inside(folder, str(entry[which]))), width, height) if entry.get(which) else ""
        for which in ("truth", "prediction")
    }
    return {**entry, **outlines, "uri": uri, "width": width, "height": height}


def _read_mask(path: Path) -> NDArray[np.bool_]:
    return np.asarray(_open(path).convert("L")) >= 128


def _thinned(ring: NDArray[np.float64], tolerance: float) -> NDArray[np.float64]:
    points = approximate_polygon(ring, tolerance)
    return points if len(points) > 3 else ring


def _inside(folder: Path, name: str) -> Path:
    return inside(folder, name, "index.json")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise UserError(f"{path} is missing though the run lists it; run `fewmask evaluate` again.") from None
    except (OSError, UnidentifiedImageError, SyntaxError):
        raise UserError(f"{path} is not a readable JPEG or PNG; run the step that writes it again.") from None


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

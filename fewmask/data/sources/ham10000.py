"""HAM10000: 10,015 images, seven diagnoses, lesion ids and outlines (Tschandl et al., 2018 and 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_folder, find_optional_folder, lay_out, need_file, read_table
from fewmask.types import UserError


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archives and return `out`; UserError names a missing folder, table or image.

    Expects `HAM10000_images_part_1`, `HAM10000_images_part_2` and `HAM10000_metadata` (.csv, .tab or bare). The
    outlines are a download of their own, `HAM10000_segmentations_lesion_tschandl`: without that folder every image is
    unlabelled. `group` is the lesion, `label` the diagnosis; there is no official split.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    folders = [find_folder(raw, f"HAM10000_images_part_{part}") for part in (1, 2)]
    table = need_file(raw, "HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
    pictures = {path.stem: path for folder in folders for path in folder.glob("*.jpg")}
    outlines = _outlines(raw)
    for row in read_table(table, ("lesion_id", "image_id", "dx")):
        image = row["image_id"].strip('"')
        if image not in pictures:
            raise UserError(f"'{raw}' has no '{image}.jpg', which '{table.name}' lists; unpack both image archives.")
        if outlines is not None and image not in outlines:
            raise UserError(f"'{raw}' has no '{image}_segmentation.png'; unpack the archive of segmentations again.")
        mask = None if outlines is None else outlines[image]
        yield Entry(image, pictures[image], mask, group=row["lesion_id"], label=row["dx"])


def _outlines(raw: Path) -> dict[str, Path] | None:
    folder = find_optional_folder(raw, "HAM10000_segmentations_lesion_tschandl")
    if folder is None:
        return None
    return {path.stem.removesuffix("_segmentation"): path for path in folder.glob("*_segmentation.png")}

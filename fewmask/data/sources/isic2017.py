"""ISIC-2017 challenge, part 1 (lesion segmentation): 2000 + 150 + 600 images (Codella et al., arXiv 1710.05006)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_file, find_folder, is_marked, lay_out, pair_folder, read_table
from fewmask.types import Split

PARTS: tuple[tuple[str, Split], ...] = (("Training", "train"), ("Validation", "val"), ("Test_v2", "test"))


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archives and return `out`; UserError names a missing folder or mask.

    Expects `ISIC-2017_{Training,Validation,Test_v2}_{Data,Part1_GroundTruth}` and keeps the official split. The
    superpixel maps among the images are passed over. Labels come from part 3's tables where they are present.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    for part, split in PARTS:
        images = find_folder(raw, f"ISIC-2017_{part}_Data")
        masks = find_folder(raw, f"ISIC-2017_{part}_Part1_GroundTruth")
        yield from pair_folder(images, masks, split, _labels(raw, part))


def _labels(raw: Path, part: str) -> dict[str, str]:
    """Return {image: melanoma, seborrheic_keratosis or nevus}; the table marks the first two and leaves the rest."""
    table = find_file(raw, f"ISIC-2017_{part}_Part3_GroundTruth.csv")
    if table is None:
        return {}
    kinds = ("melanoma", "seborrheic_keratosis")
    rows = read_table(table, ("image_id", *kinds))
    return {row["image_id"]: next((kind for kind in kinds if is_marked(row, kind, table)), "nevus") for row in rows}

"""ISIC-2016 challenge, part 1 (lesion segmentation): 900 training and 379 test images (Gutman et al., 2016)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_file, find_folder, lay_out, pair_folder, read_lines
from fewmask.types import Split

PARTS: tuple[tuple[str, Split], ...] = (("Training", "train"), ("Test", "test"))


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archives and return `out`; UserError names a missing folder or mask.

    Expects `ISBI2016_ISIC_Part1_{Training,Test}_{Data,GroundTruth}`. The official split is kept; validation is left for
    the program to take from training. Labels (benign, malignant) come from part 3's tables where they are present.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    for part, split in PARTS:
        images = find_folder(raw, f"ISBI2016_ISIC_Part1_{part}_Data")
        masks = find_folder(raw, f"ISBI2016_ISIC_Part1_{part}_GroundTruth")
        yield from pair_folder(images, masks, split, _labels(raw, part))


def _labels(raw: Path, part: str) -> dict[str, str]:
    """Return {image: label}; the tables have no header, and say benign/malignant for training but 0.0/1.0 for test."""
    table = find_file(raw, f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv")
    if table is None:
        return {}
    names = {"0.0": "benign", "1.0": "malignant", "benign": "benign", "malignant": "malignant"}
    rows = csv.reader(read_lines(table))
    return {row[0]: names.get(row[1].strip(), "") for row in rows if len(row) >= 2}

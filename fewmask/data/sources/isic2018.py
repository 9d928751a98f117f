"""ISIC-2018 challenge, task 1 (lesion segmentation): 2594 + 100 + 1000 images (Codella et al., arXiv 1902.03368)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_folder, lay_out, pair_folder
from fewmask.types import Split

PARTS: tuple[tuple[str, Split], ...] = (("Training", "train"), ("Validation", "val"), ("Test", "test"))


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archives and return `out`; UserError names a missing folder or mask.

    Expects `ISIC2018_Task1-2_{Training,Validation,Test}_Input` and `ISIC2018_Task1_{...}_GroundTruth`, and keeps the
    official split. The publisher gives no diagnosis with this task.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    for part, split in PARTS:
        images = find_folder(raw, f"ISIC2018_Task1-2_{part}_Input")
        masks = find_folder(raw, f"ISIC2018_Task1_{part}_GroundTruth")
        yield from pair_folder(images, masks, split, {})

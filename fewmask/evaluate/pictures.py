"""Pictures of the best, median and worst cases, for the report."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from fewmask.evaluate.metrics import Mask
from fewmask.evaluate.protocol import threshold_mask
from fewmask.evaluate.results import Row
from fewmask.evaluate.score import Predict, read_case
from fewmask.types import Case

LONG_SIDE = 384
NUM_BEST, NUM_MEDIAN, NUM_WORST = 4, 4, 8


def choose_cases(rows: Sequence[Row]) -> list[tuple[str, int, Row]]:
    """Return (kind, rank, row) of up to 4 best, 4 median and 8 worst cases by Dice, no case twice, rank from 1.

    The worst are of all cases, false alarms included; the best and the median are of those with a lesion (where there
    is one), because an empty mask rightly left empty is no picture. Of fewer than 16 cases, half are the worst and a
    quarter the best. Ties go by name.
    """
    worst = _by_dice(rows)[: min(NUM_WORST, math.ceil(len(rows) / 2))]
    lesions = _by_dice([row for row in rows if not row["empty_truth"]] or rows)
    rest = [row for row in lesions if row not in worst]
    num_best = min(NUM_BEST, math.ceil(len(rows) / 4))
    rest, best = rest[:-num_best], rest[::-1][:num_best]
    chosen = {"best": best, "median": _around_median(rest, lesions), "worst": worst}
    return [(kind, rank, row) for kind, rows in chosen.items() for rank, row in enumerate(rows, start=1)]


def _by_dice(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["dice"], row["name"]))


def _around_median(rest: Sequence[Row], lesions: Sequence[Row]) -> Sequence[Row]:
    median = np.median([row["dice"] for row in lesions])
    position = int(np.searchsorted([row["dice"] for row in rest], median))
    start = min(max(0, position - NUM_MEDIAN // 2), max(0, len(rest) - NUM_MEDIAN))
    return rest[start : start + NUM_MEDIAN]


def save_pictures(
    run: Path, split: str, rows: Sequence[Row], cases: Sequence[Case], predict: Predict, threshold: float = 0.5
) -> Path:
    """Write RUN/pictures/SPLIT with the chosen cases, and return its `index.json`.

    The index lists {"name", "kind", "rank", "dice", "image", "truth", "prediction"}; the last three are files beside
    it: a JPEG of at most 384 pixels a side and two PNG masks, 0 or 255, of the same size. The cases are read and
    predicted again. The folder is swapped in whole, and replaces one of an earlier evaluation.
    """
    folder = run / "pictures" / split
    folder.parent.mkdir(parents=True, exist_ok=True)
    by_name = {case.name: case for case in cases}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{split}.") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        index = [
            _save_case(fresh, kind, rank, row, by_name[row["name"]], predict, threshold)
            for kind, rank, row in choose_cases(rows)
        ]
        (fresh / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _swap(fresh, folder, Path(scratch) / "old")
    return folder / "index.json"


def _save_case(
    folder: Path, kind: str, rank: int, row: Row, case: Case, predict: Predict, threshold: float
) -> dict[str, Any]:
    image, truth = read_case(case)
    prediction = threshold_mask(predict(image), threshold)
    # A case's name may hold anything, a slash too; the files are named by their place in the index instead.
    stem = f"{kind}_{rank:02d}"
    files = {"image": f"{stem}_image.jpg", "truth": f"{stem}_truth.png", "prediction": f"{stem}_prediction.png"}
    picture = PillowImage.fromarray(image)
    size = thumbnail_size(picture.size)
    picture.resize(size, PillowImage.Resampling.BILINEAR).save(folder / files["image"], quality=88)
    shrink_mask(truth, size).save(folder / files["truth"])
    shrink_mask(prediction, size).save(folder / files["prediction"])
    return {"name": row["name"], "kind": kind, "rank": rank, "dice": row["dice"], **files}


def thumbnail_size(size: tuple[int, int], long_side: int = LONG_SIDE) -> tuple[int, int]:
    """Return (width, height) scaled so that the longer side is at most `long_side`; never enlarged, never 0."""
    scale = min(1.0, long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shrink_mask(mask: Mask, size: tuple[int, int]) -> PillowImage.Image:
    """Return the mask as a picture of (width, height) with 255 where at least half of a pixel is covered."""
    coverage = PillowImage.fromarray(mask.astype(np.uint8) * 255).resize(size, PillowImage.Resampling.BILINEAR)
    return coverage.point(lambda value: 255 if value >= 128 else 0)


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

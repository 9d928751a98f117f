"""What a reader of a measured table must know beside its figures: how they were made, and what it leaves out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewmask.commands.defaults import changed_defaults
from fewmask.commands.grid import EQUAL_WEIGHT, Order, cells
from fewmask.commands.tables import MultiTask
from fewmask.engine.run import read_json

CELL = re.compile(r"(\d+(?:\.\d+)?(?:e-\d+)?)-(\d+)")  # the folder of a share of the masks and a seed
STATEMENTS = (
    "Figures are means over images and seeds, at the masks' own size but for those marked 256 (at 256x256 pixels). "
    "HD95 counts a lesion without any predicted pixel as the image's diagonal.",
    "Intervals hold 95 % of 2,000 bootstrap replicates in which the seeds and the patients (or lesions; images where "
    "neither is known) are drawn with replacement.",
    "Differences are taken image by image, averaged over the seeds that both rows have; their intervals are "
    "bootstrapped over patients alone, and p-values come from random changes of sign by patient, not corrected for "
    "their number.",
    "The clock of a training starts after the data are decoded and the superpixels made, once for all runs.",
)


def remarks(order: Order, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sentences below a table, `rows` its lines."""
    return [*STATEMENTS, *_statements(order, rows)]


def _statements(order: Order, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what else a reader must know of this table."""
    if others := _not_asked_for(order):
        told = ", ".join(f"{row} ({'; '.join(shares)})" for row, shares in others.items())
        yield (
            f"The folder also holds finished runs that were not asked for this time: {told}. "
            "Name them in grid.rows, grid.fractions and grid.seeds to see them in the table."
        )
    yield from _of_other_versions(order)
    if order.grid.folds:
        yield (
            f"The data have no split: their patients are dealt to {order.grid.folds} folds, seed k tests fold k, and "
            "what it tests, no network of that seed has seen; its validation images are drawn from the other folds. So "
            "each image is tested once: figures of the test images are means over all images of all folds, intervals "
            "draw patients alone, and differences pair the same image in two rows."
        )
    if any(row["empty"] for row in rows):
        yield (
            "Some images have no lesion; their Dice is 1 where nothing is predicted and 0 elsewhere, and so the mean "
            "over all rewards a model that predicts nothing. 'Dice, lesions' is over the images with a lesion; "
            "'found' is the share of these with any predicted pixel, 'left empty' that of the others with none."
        )
    if order.what.selects:
        yield from _two_stage_statements(order)


def _of_other_versions(order: Order) -> Iterator[str]:
    """Yield which runs were made when their methods had other defaults, or do not say which they had."""
    jobs = {job.folder: job for cell in cells(order) for job in order.jobs(*cell) if job.facts}
    silent: list[Path] = []
    others: dict[str, list[Path]] = {}
    for folder, job in jobs.items():
        changed = changed_defaults(read_json(folder / "run.json"), job.defaults)
        if changed is None:
            silent.append(folder)
        for key, (then, now) in (changed or {}).items():
            others.setdefault(f"{key} was {then}, in this version {now}", []).append(folder)
    for what, folders in others.items():
        yield f"Made by a version with another default ({what}): {_counted(order, folders)}."
    if silent:
        yield f"Made by a version that did not keep what its methods' defaults were: {_counted(order, silent)}."


def _counted(order: Order, folders: Sequence[Path]) -> str:
    """Return the runs' folders within the table's, those of one row's cells counted."""
    counts = Counter(folder.relative_to(order.out).parts[0] for folder in folders)
    alone = {path.name for path in folders if path.parent == order.out}
    return ", ".join(name if name in alone else f"{name} ({number})" for name, number in counts.items())


def _two_stage_statements(order: Order) -> Iterator[str]:
    section, apart = order.selects, [task for task in order.selects.tasks if task not in order.joint_tasks]
    weights = ", ".join(f"{weight:g}" for weight in section.weights)
    yield (
        f"A cell's selection trains each of {', '.join(section.tasks)} in each mode ({', '.join(section.modes)}). Row "
        f"joint-TASK has the weight among {weights} with the highest validation Dice; best-single is the candidate "
        "with the highest of all; ensemble and distilled have each task in its better mode. No test image has a part."
    )
    if order.grid.train_time == "none":
        yield "Every training did its epochs: a network that was pre-trained first was trained for longer than others."
    else:
        yield (
            f"Every single network was trained for {order.grid.train_time}, a pre-training and its fine-tuning "
            f"together, and every student for {order.grid.distill_time}. Finding the rows of a selection took the time "
            "of all its candidates."
        )
    if any(isinstance(row, MultiTask) for row in order.rows.values()):
        left = f"; {', '.join(apart)}, which needs masks, would take from the others the images without one"
        yield (
            f"Rows uniform and pcgrad train jointly with {', '.join(order.joint_tasks)}, each loss with the weight "
            f"{EQUAL_WEIGHT:g}{left if apart else ''}."
        )
    if "plain-longer" in order.rows:
        yield (
            "Row plain-longer starts from row plain as the students do from their teachers, and trains for a student's "
            "time on the masks alone."
        )
    if any(name.startswith("five-seeds") for name in order.rows):
        yield (
            f"Rows five-seeds-...: here {len(section.tasks)} networks without any task, as many as a selection "
            "chooses, on the same masks and unlike in their seed alone; the first is row plain's."
        )


def _not_asked_for(order: Order) -> dict[str, list[str]]:
    """Return what an earlier call has scored in this folder and this one leaves out: by row, shares and seeds."""
    asked = {order.folder(*cell) for cell in cells(order)}
    found: dict[str, list[str]] = {}
    for row in order.what.rows:
        named = ((path, CELL.fullmatch(path.name)) for path in (order.out / row).glob("*-*") if path not in asked)
        runs = sorted(
            (float(cell[1]), int(cell[2])) for path, cell in named if cell and (path / "metrics.json").exists()
        )
        if runs:
            found[row] = [f"{100 * share:g} %, seed {seed}" for share, seed in runs]
    return found

"""`fewmask reproduce`: a table of a paper, measured on data at hand, beside the paper's figures."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fewmask.commands.cost import note_costs
from fewmask.commands.grid import Cell, Order, cell_names, cells, place_order
from fewmask.commands.jobs import fingerprints, is_done, run_job
from fewmask.commands.page import markdown, write_page
from fewmask.commands.provenance import learnt_before, learnt_ids
from fewmask.commands.table import Scene, measure
from fewmask.commands.tables import Pretrained, Student
from fewmask.commands.unseen import choose_unseen
from fewmask.data.contents import fingerprint
from fewmask.data.manifest import load_cases
from fewmask.data.splits import hold_out_fold
from fewmask.engine.run import is_main, read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.types import Case, FolderInUseError, NotTrainedError, UserError

POLL_SECONDS = 2.0

# What of the grid a folder's runs must have in common, by kind of table.
PLANS = {
    "pretrained": ("pretrain_time", "finetune_time", "pretrain_seeds"),
    "distilled": ("finetune_time", "distill_time", "student", "predict_once"),
    "two-stage": ("train_time", "distill_time", "student", "folds"),
}


def reproduce(
    table: str,
    data: Path,
    manifest: str | None = None,
    budget: str = "cpu",
    unlabelled: Iterable[Path] = (),
    unseen: Path | None = None,
    out: Path | None = None,
    settings: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Run the grid of a table, job after job, and leave `table.json` and `table.md` in `out`; exit code 0 or 1.

    The table is written anew after every cell that took longer than writing it, so that the work can be cut anywhere,
    and the same command goes on from there without delay. Processes that were given the same command share the work: a
    cell that another one is busy with is put off. 1 is returned when a pre-training or a distillation ended badly: that
    is then reported as not run, with the reason.
    """
    out = out or Path("runs") / f"{table}-{budget}"
    order = place_order(table, budget, out, data, manifest, unlabelled, settings)
    scene, to_score = survey(order, unseen)
    remember(order, scene)
    left_out, line = dict(scene.left_out), Progress("reproduce")
    for name, reason in left_out.items():
        Progress(name).close(f"not run: {reason}")
    planned, to_write = list(cells(order, left_out)), 0.0
    # Cells that are done already say nothing about the time that the others take.
    to_do = {cell for cell in planned if not all(is_done(job, to_score) for job in order.jobs(*cell))}
    num_to_do = len(to_do)
    line.update(0.0)
    for cell, seconds in run_cells(order, planned, to_score, left_out):
        begun = time.perf_counter()
        if is_main() and seconds > to_write:
            note_costs(order)
            _write(order, scene, left_out)
            to_write = time.perf_counter() - begun
        if cell in to_do:
            to_do.remove(cell)
            line.update(1 - len(to_do) / num_to_do, cell_names(*cell)[1], force=True)
    if is_main():
        note_costs(order)
        found = _write(order, scene, left_out)
        print(json.dumps(found) if as_json else f"{markdown(found)}\ntable: {out / 'table.md'}")
    return 1 if left_out.keys() > scene.left_out.keys() else 0


def run_cells(
    order: Order, planned: Iterable[Cell], unseen: Sequence[Case], left_out: dict[str, str]
) -> Iterator[tuple[Cell, float]]:
    """Do the cells and yield each with its seconds; those that another process is busy with come last."""
    waiting, in_use = deque(planned), 0
    while waiting:
        cell, begun = waiting.popleft(), time.perf_counter()
        try:
            run_cell(order, cell, unseen, left_out)
        except FolderInUseError:
            if "RANK" in os.environ:  # the processes of one training go in step, and only one of them has the lock
                raise
            waiting.append(cell)
            in_use += 1
            if in_use == len(waiting):
                Progress("reproduce").close("waiting for the processes that work on all that is left")
            if in_use >= len(waiting):
                time.sleep(POLL_SECONDS)
            continue
        in_use = 0
        yield cell, time.perf_counter() - begun


def run_cell(order: Order, cell: Cell, unseen: Sequence[Case], left_out: dict[str, str]) -> None:
    """Do a cell's jobs, unless it was left out; a training that ends badly adds its reason to `left_out`."""
    row, _, seed = cell
    if left_out.keys() & {row, order.pretraining_name(row, seed)}:
        return
    for job in order.jobs(*cell):
        try:
            # A selection serves many rows of a cell: it is not tried again for each.
            if job.verb == "select" and (known := left_out.get(cell_names("selection", *cell[1:])[1])):
                raise NotTrainedError(f"its cell's selection ended: {known}")
            run_job(job, unseen)
        except NotTrainedError as error:
            # A pre-training serves several cells of a row, or all of them, a distillation one cell alone.
            name = order.pretraining_name(row, seed) if job.verb == "pretrain" else cell_names(*cell)[1]
            if job.verb == "select":
                left_out.setdefault(cell_names("selection", *cell[1:])[1], str(error))
            left_out[name] = str(error)
            Progress(name).close(f"not run: {error}")
            return


def survey(order: Order, unseen: Path | None) -> tuple[Scene, list[Case]]:
    """Return what the table must tell of the data, and the unseen cases to score.

    Raises a UserError where the data are missing or do not say which images are for test, or where a teacher that was
    given has learnt from one of those. A validation split that nobody gave is drawn, the same for all runs. With folds,
    which are for data without splits, every image is a test image once.
    """
    cases = load_cases(order.data, Path(order.manifest) if order.manifest else None, order.unlabelled)
    masked = [case for case in cases if case.mask is not None]
    missing = [split for split in ("val", "test") if split not in {case.split for case in masked}]
    if order.grid.folds:
        hold_out_fold(cases, order.grid.folds, 0)  # splits that are there, or too few patients, are told at once
        masked = [case.in_split("test") for case in masked]
    elif "test" in missing:
        raise UserError(
            f"{order.data} names no image with a mask for {' and '.join(missing)}; every run of a table must be scored "
            "on the same images, so fill the manifest's column 'split', or give another --manifest."
        )
    learnt, remarks, _ = learnt_before(order.all_teachers, [case for case in masked if case.split == "test"])
    learnt |= learnt_ids(order.all_teachers)
    to_score: list[Case] = []
    facts: dict[str, Any] = {}
    if unseen is not None:
        to_score, facts = choose_unseen(unseen, order.data, cases, learnt, order.grid.num_unseen)
    splits = {case.name: str(case.split or "train") for case in masked}
    known: dict[str, Any] = {"data": fingerprint(cases), "unseen_data": fingerprint(to_score) if to_score else None}
    known |= _teachers_known(order)
    return Scene(splits, facts, _not_to_run(order, cases), known, tuple(remarks)), to_score


def _teachers_known(order: Order) -> dict[str, list[str]]:
    """Return the content of the given teachers; by cell where they differ, so that seeds may be added later."""
    if not order.grid.teachers:
        return {"teachers": []} if order.what.distils else {}
    if not order.teachers_differ:
        return {"teachers": fingerprints(order.grid.teachers)}
    each = product(order.fractions, range(order.grid.seeds))
    own = {f"teachers {fraction:g}-{seed}": fingerprints(order.teachers(fraction, seed)) for fraction, seed in each}
    return {"teachers": ["a cell's own"], **own}


def _not_to_run(order: Order, cases: Sequence[Case]) -> dict[str, str]:
    """Return why a row, or a row at a share of the masks, has nothing to learn from."""
    trained_on = [case for case in cases if case.split not in ("val", "test")]
    labels = {case.label for case in trained_on if case.label is not None}
    all_masked = all(case.mask is not None for case in trained_on)
    reasons = {}
    for name, row in order.rows.items():
        if isinstance(row, Pretrained) and row.recipe == "supervised" and len(labels) < 2:
            reasons[name] = (
                f"the training images are of {len(labels)} classes by the manifest's column 'label', and it takes two"
            )
        needs_others = isinstance(row, Student) and row.unlabelled and row.learns_from == "teacher"
        if needs_others and all_masked and 1.0 in order.fractions:
            reasons[cell_names(name, 1.0, 0)[0]] = "no training image is without a mask; name some with --unlabelled"
    return reasons


def remember(order: Order, scene: Scene) -> None:
    """Write plan.json, or raise a UserError where the folder holds a table of other data or times.

    Rows, fractions and seeds may be added later, and so may the unseen data; every run checks its own settings.
    """
    plan = {
        "table": order.table,
        "budget": order.budget,
        **{f"grid.{name}": getattr(order.grid, name) for name in PLANS[order.what.kind]},
        **scene.fingerprints,
    }
    path = order.out / "plan.json"
    old: Mapping[str, Any] = read_json(path) if path.exists() else {}
    for key, value in plan.items():
        if old.get(key) is not None and value is not None and old[key] != value:
            raise UserError(
                f"{order.out} holds a table with {key}={old[key]}, and you asked for {value}; use the same to resume "
                "it, or another --out."
            )
    if is_main():
        order.out.mkdir(parents=True, exist_ok=True)
        write_json(path, {**old, **{key: value for key, value in plan.items() if value is not None}})


def _write(order: Order, scene: Scene, left_out: Mapping[str, str]) -> dict[str, Any]:
    found = measure(order, scene, left_out)
    write_json(order.out / "table.json", found)
    write_page(order.out, found)
    return found

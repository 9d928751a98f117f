"""`fewmask reproduce`: a table of a paper, measured on data at hand, beside the paper's figures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewmask.commands.grid import NotTrainedError, Order, cells, place_order, run_finetuning, run_pretraining
from fewmask.commands.table import Scene, markdown, measure, write_markdown
from fewmask.data.contents import content_hashes, fingerprint
from fewmask.data.manifest import load_cases
from fewmask.engine.run import is_main, read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.types import Case, UserError


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

    The table is written anew after every job, so that the work can be cut anywhere, and the same command goes on from
    there. 1 is returned when a pre-training ended badly: its row is then reported as not run, with the reason.
    """
    out = out or Path("runs") / f"{table}-{budget}"
    order = place_order(table, budget, out, data, manifest, unlabelled, settings)
    scene, to_score = survey(order, unseen)
    remember(order, scene)
    failed = _pretrain_all(order, scene)
    left_out = {**scene.left_out, **failed}
    jobs, line = list(cells(order, left_out)), Progress("reproduce")
    for number, (row, fraction, seed) in enumerate(jobs, start=1):
        run_finetuning(order, row, fraction, seed, to_score)
        if is_main():
            _write(order, scene, left_out)
        line.update(number / len(jobs), f"{row}, {100 * fraction:g} % of the masks, seed {seed}", force=True)
    if is_main():
        found = _write(order, scene, left_out)
        print(json.dumps(found) if as_json else f"{markdown(found)}\ntable: {out / 'table.md'}")
    return 1 if failed else 0


def survey(order: Order, unseen: Path | None) -> tuple[Scene, list[Case]]:
    """Return what the table must tell of the data, and the unseen cases to score.

    Raises a UserError where the data are missing or do not say which images are for validation and test.
    """
    cases = load_cases(order.data, Path(order.manifest) if order.manifest else None, order.unlabelled)
    masked = [case for case in cases if case.mask is not None]
    if missing := [split for split in ("val", "test") if split not in {case.split for case in masked}]:
        raise UserError(
            f"{order.data} names no image with a mask for {' and '.join(missing)}; every run of a table must be scored "
            "on the same images, so fill the manifest's column 'split', or give another --manifest."
        )
    labels = {case.label for case in cases if case.label is not None and case.split not in ("val", "test")}
    left_out = {
        name: f"the training images are of {len(labels)} classes by the manifest's column 'label', and it takes two"
        for name, row in order.rows.items()
        if row.recipe == "supervised" and len(labels) < 2
    }
    to_score, facts = _unseen(order, unseen, cases) if unseen is not None else ([], {})
    splits = {case.name: str(case.split or "train") for case in masked}
    facts_of_data = {"data": fingerprint(cases), "unseen_data": fingerprint(to_score) if to_score else None}
    return Scene(splits, facts, left_out, facts_of_data), to_score


def _unseen(order: Order, folder: Path, cases: Sequence[Case]) -> tuple[list[Case], dict[str, Any]]:
    """Return the cases of another data set that no mask was learnt from, and what to tell of them."""
    masked = [case for case in load_cases(folder) if case.mask is not None]
    hashes = content_hashes([*masked, *cases])
    trained_on = {hashes[case.image] for case in cases if case.mask is not None}
    body = {hashes[case.image] for case in cases if case.mask is None}
    fresh = sorted((case for case in masked if hashes[case.image] not in trained_on), key=lambda case: case.name)
    if not fresh:
        raise UserError(f"{folder} holds no image with a mask that is not among {order.data}; name another --unseen.")
    chosen = fresh
    if 0 < order.grid.num_unseen < len(fresh):
        chosen = sorted(random.Random(0).sample(fresh, order.grid.num_unseen), key=lambda case: case.name)
    return chosen, {
        "name": folder.resolve().name,
        "num_cases": len(chosen),
        "num_masked": len(masked),
        "num_trained_on": len(masked) - len(fresh),
        "num_in_body": sum(hashes[case.image] in body for case in chosen),
    }


def remember(order: Order, scene: Scene) -> None:
    """Write plan.json, or raise a UserError where the folder holds a table of other data or times.

    Rows, fractions and seeds may be added later, and so may the unseen data; every run checks its own settings.
    """
    plan = {
        "table": order.table,
        "budget": order.budget,
        "grid.pretrain_time": order.grid.pretrain_time,
        "grid.finetune_time": order.grid.finetune_time,
        "grid.pretrain_seeds": order.grid.pretrain_seeds,
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


def _pretrain_all(order: Order, scene: Scene) -> dict[str, str]:
    """Pre-train every row that can be; return the reasons of those whose training ended badly."""
    failed: dict[str, str] = {}
    for row, what in order.rows.items():
        if what.recipe is None:
            continue
        if row in scene.left_out:
            Progress(row).close(f"not run: {scene.left_out[row]}")
            continue
        for seed in range(order.grid.pretrain_seeds):
            try:
                run_pretraining(order, row, seed)
            except NotTrainedError as error:
                failed[row] = str(error)
                Progress(row).close(f"not run: {error}")
                break
    return failed


def _write(order: Order, scene: Scene, left_out: Mapping[str, str]) -> dict[str, Any]:
    found = measure(order, scene, left_out)
    write_json(order.out / "table.json", found)
    write_markdown(order.out / "table.md", found)
    return found

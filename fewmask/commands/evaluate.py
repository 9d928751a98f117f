"""`fewmask evaluate`: measure a run's segmenter on a split, once, at native size."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewmask.data.manifest import load_cases
from fewmask.deploy.run_files import THRESHOLD
from fewmask.deploy.torch_predictor import TorchPredictor
from fewmask.engine.run import read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.evaluate.pictures import save_pictures
from fewmask.evaluate.score import compare, read_case_csv, score_cases, summarise, write_case_csv, write_metrics
from fewmask.types import Case, UserError


def evaluate(
    run: Path,
    data: Path,
    split: str = "test",
    manifest: str | None = None,
    against: Path | None = None,
    as_json: bool = False,
) -> int:
    """Score the run on a split of a data folder; writes metrics.json, a CSV of cases and pictures into the run."""
    cases, key = _cases(run, data, manifest, split)
    summary = evaluate_cases(run, cases, key)
    if against is not None:
        rows = compare(read_case_csv(run / f"cases_{key}.csv"), read_case_csv(against / f"cases_{key}.csv"))
        summary = {**summary, "against": {"run": str(against), **rows}}
        write_json(run / "compare.json", summary["against"])
    if as_json:
        print(json.dumps({key: summary}))
    else:
        print(sentence(key, summary))
        if against is not None:
            print(_difference(summary["against"]))
    return 0


def evaluate_cases(run: Path, cases: Sequence[Case], key: str) -> dict[str, Any]:
    """Score the run's segmenter on cases and write `metrics.json` (under `key`), `cases_KEY.csv` and the pictures."""
    predictor = TorchPredictor(run)
    line = Progress(f"evaluate {key}")
    rows = score_cases(predictor, cases, THRESHOLD, on_progress=line.count)
    summary = summarise(rows)
    write_case_csv(run / f"cases_{key}.csv", rows)
    save_pictures(run, key, rows, cases, predictor, THRESHOLD)
    write_metrics(run / "metrics.json", key, summary)
    line.close(sentence(key, summary))
    return summary


def sentence(key: str, summary: dict[str, Any]) -> str:
    """Return the result of a split in one line."""
    num = summary["num_cases"]
    return (
        f"{key}: Dice {summary['dice']['mean']:.3f}{_interval(summary['dice'], '.3f')}, "
        f"HD95 {summary['hd95_256']['mean']:.1f} px at 256x256, {summary['missed']} missed, "
        f"on {num} image{'s' if num != 1 else ''}"
    )


def _interval(figure: dict[str, Any], form: str) -> str:
    if figure["low"] is None:  # one patient alone has no honest interval
        return ""
    return f" (95 % interval {figure['low']:{form}} to {figure['high']:{form}})"


def _difference(row: dict[str, Any]) -> str:
    return f"against {row['run']}: {row['difference']:+.4f} Dice{_interval(row, '+.4f')}, p {row['p_value']:.3g}"


def _cases(run: Path, data: Path, manifest: str | None, split: str) -> tuple[list[Case], str]:
    """Return the cases to score and the key of the result.

    On the run's own data the split is the one the run used. On other data it is the manifest's; a data set without
    any split is scored whole, since nothing of it was trained on.
    """
    cases = load_cases(data, Path(manifest) if manifest else None)
    facts = read_json(run / "run.json").get("data") or {}
    masked = [case for case in cases if case.mask is not None]
    own = _splits_of(run)
    if Path(facts.get("root", "")).resolve() == data.resolve() and own:
        if split == "all":
            raise UserError("--split all would score images this run was trained on; choose test or val.")
        chosen = [case.in_split("test") for case in masked if own.get(case.image.resolve()) == split]
        key = split
    else:
        none_given = all(case.split is None for case in masked)
        chosen = masked if none_given or split == "all" else [case for case in masked if case.split == split]
        key = f"{data.resolve().name}-{'all' if none_given or split == 'all' else split}"
    if not chosen:
        raise UserError(f"{data} has no image with a mask in the split '{split}'; choose another --split or manifest.")
    return chosen, key


def _splits_of(run: Path) -> dict[Path, str]:
    """Return the split of each image the run knows, from its cases.csv; empty where there is none."""
    path = run / "cases.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {Path(row["image"]).resolve(): row["split"] for row in csv.DictReader(file)}

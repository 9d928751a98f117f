"""`fewmask evaluate`: measure a run's segmenter on a split, once, at native size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewmask.commands.provenance import public_id, run_of, used_ids
from fewmask.data.contents import content_hashes
from fewmask.data.manifest import load_cases
from fewmask.deploy.predictor import ImagePredictor
from fewmask.deploy.run_files import THRESHOLD, find_segmenter
from fewmask.deploy.torch_predictor import TorchPredictor
from fewmask.engine.run import read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.evaluate.pictures import save_pictures
from fewmask.evaluate.score import compare, read_case_csv, score_cases, summarise, write_case_csv, write_metrics
from fewmask.types import Case, UserError

# What a run writes of the images of a split (contents.json).
USE_OF = {"train": "labelled", "val": "validation", "test": "excluded-test"}
CHOICES = (*USE_OF, "all")


def evaluate(
    run: Path,
    data: Path,
    split: str = "test",
    manifest: str | None = None,
    against: Path | None = None,
    as_json: bool = False,
) -> int:
    """Score the run on a split of a data folder; writes metrics.json, a CSV of cases and pictures into the run."""
    if split not in CHOICES:
        raise UserError(f"There is no split '{split}'; choose one of: {', '.join(CHOICES)}.")
    cases, key = _cases(run, data, manifest, split)
    others = read_case_csv(against / f"cases_{key}.csv") if against is not None else None
    summary = evaluate_cases(run, cases, key, place=None if key in USE_OF else place_of(data))
    if others is not None:
        found = compare(read_case_csv(run / f"cases_{key}.csv"), others)
        summary = {**summary, "against": {"run": str(against), **found}}
        write_json(run / "compare.json", {"split": key, **summary["against"]})
    if as_json:
        print(json.dumps({key: summary}))
    else:
        print(sentence(key, summary))
        if against is not None:
            print(_difference(summary["against"]))
    return 0


def evaluate_cases(
    run: Path, cases: Sequence[Case], key: str, stage: str | None = None, place: str | None = None
) -> dict[str, Any]:
    """Score the run's segmenter on cases and write `metrics.json` (under `key`), `cases_KEY.csv` and the pictures.

    With `stage`, it is that stage's segmenter, and the files go into the stage's folder. `place` says where the cases
    lie, for data that are not the run's own (see `place_of`).
    """
    predictor = TorchPredictor(run, scoring_device(_asked_device(run)), stage)
    return score_into(run if stage is None else run / stage, predictor, cases, key, place)


def _asked_device(run: Path) -> str:
    record = read_json(run / "run.json") if (run / "run.json").exists() else None
    config = record.get("config") if isinstance(record, dict) else None
    return str(((config or {}).get("run") or {}).get("device", "auto"))


def scoring_device(asked: str) -> str:
    """Return where a trained network is scored: "cuda" where `run.device` asked for it or left it open, else "cpu".

    A run that was trained on a GPU may be scored on a machine without one, so that its absence is no error here.
    """
    return "cuda" if asked in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


def score_into(
    folder: Path, predictor: ImagePredictor, cases: Sequence[Case], key: str, place: str | None = None
) -> dict[str, Any]:
    """Score a predictor on cases; write `metrics.json` (under `key`), `cases_KEY.csv` and pictures into a folder."""
    line = Progress(f"evaluate {key}")
    rows = score_cases(predictor, cases, THRESHOLD, on_progress=line.count)
    summary = summarise(rows) | ({"place": place} if place else {})
    write_case_csv(folder / f"cases_{key}.csv", rows)
    save_pictures(folder, key, rows, cases, predictor, THRESHOLD)
    write_metrics(folder / "metrics.json", key, summary)
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

    Images the run has used are known by their content or public identifier, wherever they lie now. On the run's own
    data the split is the one the run used. On other data it is the manifest's; a set without any split is scored
    whole, but for images the run has learnt from, which are left out with a remark.
    """
    home = run_of(find_segmenter(run))
    if home is None:
        raise UserError(
            f"{run} does not say which images it has learnt from (there is no contents.json), so that no figure of it "
            "could be trusted: give a run folder that fewmask wrote, as a whole."
        )
    record = read_json(home / "run.json")
    facts = (record.get("data") if isinstance(record, dict) else None) or {}
    own_root = Path(facts.get("root", "")).resolve() == data.resolve()
    chosen_manifest = manifest or (facts.get("manifest") if own_root else None)
    cases = load_cases(data, Path(chosen_manifest) if chosen_manifest else None)
    masked = [case for case in cases if case.mask is not None]
    hashes, uses, by_id = content_hashes(masked), read_json(home / "contents.json"), used_ids(home)
    use = {case.name: uses.get(hashes[case.image]) or by_id.get(public_id(case.image) or "") for case in masked}
    if masked and set(use.values()) == {"unlabelled"}:
        raise UserError(
            f"{run} has learnt from all these images, without their masks: no figure of it on them would be of new "
            "images. Evaluate it on images that it has not seen, or fine-tune a segmenter that keeps a test split."
        )
    if masked and all(use.values()):
        if split == "all":
            raise UserError("--split all would score images this run was trained on; choose test or val.")
        if split == "test" and facts.get("test_images_seen"):
            Progress("evaluate").close(
                f"{facts['test_images_seen']} of the test images were seen before, without their masks, by a model "
                "that this run began with or learnt from"
            )
        return _chosen([case for case in masked if use[case.name] == USE_OF[split]], data, split), split
    fresh = [case for case in masked if use[case.name] in (None, USE_OF["test"])]
    if len(fresh) < len(masked):
        Progress("evaluate").close(f"{len(masked) - len(fresh)} images were left out: the run has learnt from them")
    whole = split == "all" or all(case.split is None for case in fresh)
    chosen = fresh if whole else [case for case in fresh if case.split == split]
    return _chosen(chosen, data, split), _key(run, data.resolve(), "all" if whole else split)


def _key(run: Path, data: Path, split: str) -> str:
    """Return the name of a result on other data: the folder's, with its parent's where another folder has that."""
    key, path = f"{data.name}-{split}", run / "metrics.json"
    known = read_json(path).get(key, {}).get("place") if path.exists() else None
    return key if known in (None, place_of(data)) else f"{data.parent.name}-{key}"


def place_of(data: Path) -> str:
    """Return 8 hex digits for the place of a data folder; a result that may travel does not tell the path itself."""
    return hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]


def _chosen(cases: list[Case], data: Path, split: str) -> list[Case]:
    if not cases:
        raise UserError(f"{data} has no image with a mask in the split '{split}'; choose another --split or manifest.")
    return cases

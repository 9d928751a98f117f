"""What images without a mask bring to a small student: taught by few masks alone, or also by what a teacher says.

For each share of the masks and each seed, which draws the masks, a U-Net on EfficientNet-Lite0 is fine-tuned: the
teacher. Then each student is trained for the same time from the masks alone, and from the masks and the teacher's
predictions on every image that may be learnt from, or as many of them as three tenths of that time allow.

    python -m benchmarks.unlabelled_students DATA --manifest manifest_isic2017.csv --unlabelled HAM10000 --out RUNS

Teachers lie in RUNS/teacher/SHARE-SEED; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.continued_pretraining import MODEL, add_options, data_settings, fewmask, finished
from fewmask.commands.table import average_seeds, describe_cell
from fewmask.engine.run import read_json, write_json
from fewmask.evaluate.score import compare

ALONE = ("distill.method.losses={}", "distill.unlabelled=false")
TAUGHT = ()  # as the recipe says: kd on every image, predictions made once
RECIPES = ("mobile_unet", "tiny_unet")


def train(args: argparse.Namespace, words: list[str], out: Path) -> None:
    """Train one network and score it, unless that is done."""
    if (out / "metrics.json").exists():
        return
    unlabelled = json.dumps([str(folder) for folder in args.unlabelled])
    fewmask(*words, *data_settings(args), f"data.unlabelled={unlabelled}", f"run.out={out}", f"run.clock={args.clock}")
    fewmask("evaluate", str(out), str(args.data), "--manifest", args.manifest)


def cell(args: argparse.Namespace, fraction: float, seed: int) -> None:
    """Train the teacher and every student of a share of the masks and a seed."""
    own = [f"run.seed={seed}", f"data.label_fraction={fraction}"]
    teacher = args.out / "teacher" / f"{fraction:g}-{seed}"
    words = ["finetune", "unet", *MODEL, "model.weights=packaged", f"run.time={args.teacher_time}"]
    train(args, [*words, *own], teacher)
    for recipe in args.students:
        for name, settings in (("alone", ALONE), ("taught", TAUGHT)):
            words = ["distill", recipe, *settings, f'distill.teachers=["{teacher}"]', f"run.time={args.student_time}"]
            train(args, [*words, *own], args.out / f"{recipe}-{name}" / f"{fraction:g}-{seed}")


def table(args: argparse.Namespace) -> dict:
    """Return what is finished so far, ready for JSON."""
    arms = ["teacher", *(f"{recipe}-{name}" for recipe in args.students for name in ("alone", "taught"))]
    cells, differences, stages = [], [], {}
    for fraction in args.fractions:
        found = {}
        for arm in arms:
            found[arm] = finished(args, arm, fraction)
            if found[arm]:
                cells.append({"arm": arm, "fraction": fraction, **describe_cell(found[arm])})
                stage = "finetune" if arm == "teacher" else "distill"
                first = args.out / arm / f"{fraction:g}-{min(found[arm])}" / stage / "stage.json"
                stages[f"{arm} {fraction:g}"] = read_json(first)
        pairs = [(f"{r}-taught", other) for r in args.students for other in (f"{r}-alone", "teacher")]
        for arm, other in pairs:
            if seeds := sorted(found[arm].keys() & found[other].keys()):
                paired = compare(average_seeds(found[arm], seeds), average_seeds(found[other], seeds))
                differences.append({"arm": arm, "against": other, "fraction": fraction, "seeds": seeds, **paired})
    keys = ("teacher_time", "student_time", "threads", "clock")
    facts = {key: getattr(args, key) for key in keys} | {"cores": os.cpu_count()}
    return {**facts, "cells": cells, "differences": differences, "stages": stages}


def main() -> None:
    """Run the cells, all shares with one seed before the next seed, and write table.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--students", nargs="+", default=list(RECIPES))
    parser.add_argument("--teacher-time", default="4m")
    parser.add_argument("--student-time", default="4m")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    for seed in range(args.seeds):
        for fraction in args.fractions:
            cell(args, fraction, seed)
            write_json(args.out / "table.json", table(args))


if __name__ == "__main__":
    main()

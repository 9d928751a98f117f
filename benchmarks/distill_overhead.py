"""What a step of distillation costs beside the student's own step and the teacher's forward.

    python -m benchmarks.distill_overhead --threads 1 --clock cpu --out benchmarks/results

Each step is `engine.fit`'s own, views, clipping and averaging included, on one fixed batch; the parts take turns in one
process and medians over the rounds are compared. `ratio` is a step with a loss over the sum of the student's step alone
and of the teacher's forward, which no distillation that asks its teacher can do without: the rest is what the losses
cost. "predict_once" is a step whose teacher was asked before the training, its features included.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import build_loop, one_step, raw_batch, take_turns
from fewmask.config import RunSection, StageSection
from fewmask.data.augment import PlainViews
from fewmask.distill.distill import Distill
from fewmask.engine.device import resolve_precision
from fewmask.engine.fit import Fit
from fewmask.engine.run import versions, write_json
from fewmask.engine.stage import CLOCKS
from fewmask.models import Segmenter, build_encoder, build_segmenter

LOSSES: dict[str, dict[str, Any]] = {
    "alone": {}, "kd": {"kd": {}}, "at": {"at": {}}, "fitnet": {"fitnet": {}}, "cwd": {"cwd": {}}, "mgd": {"mgd": {}},
    "emkd": {"emkd": {}}, "mbf": {"mbf": {}}, "m2bf": {"m2bf": {}}, "m2bf parallel": {"m2bf": {"form": "parallel"}},
}  # fmt: skip


def build(name: str, size: int) -> Segmenter:
    """Return "SEGMENTER on ENCODER" with fresh weights."""
    segmenter, _, encoder = name.partition(" on ")
    return build_segmenter(segmenter, build_encoder(encoder, size=size))


def loop_for(name: str, losses: dict[str, Any], args: argparse.Namespace, folder: Path, once: bool = False) -> Fit:
    """Return fewmask's loop of a student with these losses, what they read of its teacher stored if `once`."""
    torch.manual_seed(0)
    student, teacher = build(args.student, args.size), build(args.teacher, args.size)
    objective = Distill(student, [teacher], size=args.size, losses=losses, average=0.99)
    batch = raw_batch(args.batch, args.size, masked=True)
    if once:
        assert batch.mask is not None
        with torch.no_grad():
            output = teacher(PlainViews(args.size)(batch).image)
        features = [output.features[level].half() for level in objective.stored_levels]
        batch = replace(batch, mask=torch.cat([batch.mask, batch.mask], dim=1), features=features)
    section = StageSection(method={"name": "distill"}, lr=1e-3, batch_size=args.batch)
    return build_loop(objective, batch, section, args.precision, folder / name)


def teacher_alone(loop: Fit, image: torch.Tensor) -> None:
    """Do what asking the teacher costs, in the precision of the training."""
    objective: Any = loop.objective
    with torch.no_grad(), loop.accelerator.autocast():
        objective.teacher.outputs(image)


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mobile_unet on efficientnet_lite0")
    parser.add_argument("--student", default="tiny_unet on tiny")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default=resolve_precision(RunSection(device="cpu")))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        loops = {name: loop_for(name, losses, args, Path(scratch)) for name, losses in LOSSES.items()}
        for name in ("kd", "mbf", "m2bf"):
            loops[f"{name}, predict_once"] = loop_for(f"{name} once", LOSSES[name], args, Path(scratch), once=True)
        sides: dict[str, Any] = {name: partial(one_step, loop) for name, loop in loops.items()}
        image = loops["kd"].views(loops["kd"].loader.batch(0)).image
        sides["teacher"] = partial(teacher_alone, loops["kd"], image)
        seconds = take_turns(sides, args.rounds, CLOCKS[args.clock])
    floor = seconds["alone"] + seconds["teacher"]
    for name, taken in seconds.items():
        print(f"{name}: {1000 * taken:.0f} ms, {taken / floor:.2f} of student + teacher")
    result = {
        "teacher": args.teacher, "student": args.student, "size": args.size, "batch": args.batch,
        "threads": args.threads, "rounds": args.rounds, "clock": args.clock, "precision": args.precision,
        "machine": platform.processor(), "cores": os.cpu_count(), "versions": versions(), "seconds": seconds,
        "ratio": {name: taken / floor for name, taken in seconds.items()},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "distill_overhead.json", result)


if __name__ == "__main__":
    main()

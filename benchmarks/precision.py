"""What a training step takes in bf16, as a share of the time in fp32, on this machine's processor.

    python -m benchmarks.precision --threads 1 --clock cpu --out benchmarks/results

Each step is `engine.fit`'s own on one fixed batch, views included. A network's two precisions take turns in one process
and medians over the rounds are compared. `engine.device.resolve_precision` chooses by such figures.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.distill_overhead import build
from benchmarks.throughput import build_loop, build_objective, one_step, raw_batch, take_turns
from fewmask.config import StageSection
from fewmask.engine.fit import Fit
from fewmask.engine.run import versions, write_json
from fewmask.engine.stage import CLOCKS
from fewmask.finetune.segment import Segment

PRETRAINED = [
    ("mae", "vit_micro_patch8", 64, 64), ("mae", "vit_tiny_patch8", 128, 16), ("g2ll", "vit_tiny_patch8", 128, 8),
    ("simmim", "efficientnet_lite0", 128, 16),
]  # fmt: skip
"""Method, encoder, size, batch."""

SEGMENTERS = ["tiny_unet on tiny", "mobile_unet on efficientnet_lite0", "unet on efficientnet_lite0"]

MakeLoop = Callable[[str, Path], Fit]


def pretraining(method: str, encoder: str, size: int, num: int, precision: str, folder: Path) -> Fit:
    """Return the loop of a pre-training from fresh weights."""
    objective = build_objective(method, encoder, size)
    batch = raw_batch(num, size, objective.maps().get("superpixels"))
    section = StageSection(method={"name": method}, lr=1.5e-4, batch_size=num)
    return build_loop(objective, batch, section, precision, folder)


def finetuning(name: str, size: int, num: int, precision: str, folder: Path) -> Fit:
    """Return the loop of the fine-tuning of "SEGMENTER on ENCODER" from fresh weights."""
    torch.manual_seed(0)
    objective = Segment(build(name, size), size=size, average=0.99)
    section = StageSection(method={"name": "segment"}, lr=1e-3, batch_size=num)
    return build_loop(objective, raw_batch(num, size, masked=True), section, precision, folder)


def cells(size: int = 128, num: int = 16) -> dict[str, MakeLoop]:
    """Return what is measured by name; the size and batch are those of the fine-tunings."""
    pretrainings: dict[str, MakeLoop] = {
        f"{method} on {encoder}@{side}, batch {batch}": partial(pretraining, method, encoder, side, batch)
        for method, encoder, side, batch in PRETRAINED
    }
    return pretrainings | {
        f"fine-tuning, {name}@{size}, batch {num}": partial(finetuning, name, size, num) for name in SEGMENTERS
    }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="of the fine-tunings")
    parser.add_argument("--batch", type=int, default=16, help="of the fine-tunings")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, make in cells(args.size, args.batch).items():
        with tempfile.TemporaryDirectory() as scratch:
            sides = {p: partial(one_step, make(p, Path(scratch) / p)) for p in ("fp32", "bf16")}
            seconds = take_turns(sides, args.rounds, CLOCKS[args.clock])
        rows.append({"step": name, "seconds": seconds, "ratio": seconds["bf16"] / seconds["fp32"]})
        print(f"{name}: {seconds['fp32']:.2f} s in fp32, {rows[-1]['ratio']:.2f} of it in bf16", flush=True)
    result = {
        "threads": args.threads, "rounds": args.rounds, "clock": args.clock, "machine": platform.processor(),
        "versions": versions(), "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "precision.json", result)


if __name__ == "__main__":
    main()

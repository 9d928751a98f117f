"""What a training step takes where the last block computes the class token alone, as a share of the whole block's time.

    python -m benchmarks.global_feature --out benchmarks/results

Each step is `engine.fit`'s own on one fixed batch, views included. The two take turns in one process and medians over
the rounds are compared.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.precision import pretraining
from benchmarks.throughput import one_step, take_turns
from fewmask.engine.fit import Fit
from fewmask.engine.run import versions, write_json
from fewmask.engine.stage import CLOCKS
from fewmask.models.vit import Vit

METHODS = ("dino", "supervised", "g2ll")
SHAPES = (("vit_micro_patch8", 64, 32), ("vit_tiny_patch8", 128, 8), ("vit_tiny_patch16", 224, 8))
"""Encoder, size, batch."""


def whole(encoder: Vit, image: Tensor) -> Tensor:
    """Return what `Vit.global_feature` does, the patches' tokens computed to the end."""
    return encoder.tokens(image)[:, 0]


def step_of_whole(loop: Fit) -> None:
    """Do a step with the whole last block."""
    with patch.object(Vit, "global_feature", whole):
        one_step(loop)


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for method in METHODS:
        for encoder, size, num in SHAPES:
            for precision in ("bf16", "fp32"):
                with tempfile.TemporaryDirectory() as scratch:
                    loop = pretraining(method, encoder, size, num, precision, Path(scratch))
                    sides = {"whole": partial(step_of_whole, loop), "class token": partial(one_step, loop)}
                    seconds = take_turns(sides, args.rounds, CLOCKS[args.clock])
                ratio = seconds["class token"] / seconds["whole"]
                name = f"{method} on {encoder}@{size}, batch {num}, {precision}"
                rows.append({"step": name, "seconds": seconds, "ratio": ratio})
                print(f"{name}: {seconds['whole']:.3f} s, {ratio:.2f} of it", flush=True)
    about = {"threads": args.threads, "rounds": args.rounds, "clock": args.clock, "machine": platform.processor()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "global_feature.json", {**about, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()

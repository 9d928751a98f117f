"""What a training step takes with memory in pages of 2 MB, as a share of the time with the usual ones of 4 kB.

    python -m benchmarks.huge_pages --out benchmarks/results

The allocator is asked when a process begins, so each figure is a process's median over its steps, and the two kinds
take turns. Steps are `engine.fit`'s own on one fixed batch, views included, in the precision that the machine chooses;
seconds are the processor's. `fewmask` asks for the large pages itself (`fewmask.__main__`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.precision import MakeLoop, cells
from benchmarks.throughput import one_step
from fewmask.__main__ import HUGE_PAGES, TUNABLES
from fewmask.config import RunSection
from fewmask.engine.device import resolve_precision
from fewmask.engine.run import versions, write_json

CELLS = cells()
KINDS = {"4 kB": {TUNABLES: "glibc.malloc.hugetlb=0"}, "2 MB": {TUNABLES: "glibc.malloc.hugetlb=1"}}


def one(make: MakeLoop, steps: int, threads: int) -> dict[str, float]:
    """Return the median seconds of a step in this process, the first two left out, and its peak memory in MB."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        step = partial(one_step, make(resolve_precision(RunSection()), Path(scratch)))
        seconds = []
        for _ in range(steps + 2):
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[2:]), "peak_mb": round(peak)}


def take_turns(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return each kind's figures of every round, their medians, and the ratio."""
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, asked in KINDS.items():
            words = [sys.executable, "-m", "benchmarks.huge_pages", "--cell", name, "--steps", str(args.steps)]
            words += ["--threads", str(args.threads)]
            environment = {**os.environ, **asked, "OMP_NUM_THREADS": str(args.threads)}
            told = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
            rounds[kind].append(json.loads(told.splitlines()[-1]))
    seconds = {kind: statistics.median(found["seconds"] for found in each) for kind, each in rounds.items()}
    return {"step": name, "seconds": seconds, "ratio": seconds["2 MB"] / seconds["4 kB"], "rounds": rounds}


def main() -> None:
    """Measure and write one JSON; with --cell, measure that step here and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=list(CELLS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(one(CELLS[args.cell], args.steps, args.threads)))
        return
    rows = []
    for name in CELLS:
        rows.append(take_turns(name, args))
        print(f"{name}: {rows[-1]['seconds']['4 kB']:.2f} s, {rows[-1]['ratio']:.2f} of it with 2 MB", flush=True)
    result = {
        "threads": args.threads, "steps": args.steps, "machine": platform.processor(), "libc": platform.libc_ver()[1],
        "transparent_hugepage": HUGE_PAGES.read_text().strip(), "precision": resolve_precision(RunSection()),
        "versions": versions(), "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "huge_pages.json", result)


if __name__ == "__main__":
    main()

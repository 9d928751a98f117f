"""Kill -9 at random moments of pre-training and of fine-tuning, resume, and compare the weights bit by bit.

    OMP_NUM_THREADS=1 python -m benchmarks.kill_resume --kills 20 --out benchmarks/results

Each kill starts from an empty folder, waits for a random moment of the training, sends SIGKILL, runs the same command
again until it ends, and compares `model.safetensors` with the uninterrupted run's. Processes are forked from one that
has imported everything, which saves the seconds of starting Python and changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import fewmask.commands.verbs  # noqa: F401 - imported before forking
from fewmask.__main__ import main as command_line
from fewmask.data.synthetic import make_dataset

STAGES = {
    "pretrain": ["pretrain", "mae", "model.encoder=vit_tiny_patch8"],
    "finetune": ["finetune", "unet"],
}


def start(stage: str, data: Path, run: Path) -> int:
    """Start one training in a process of its own; return its number."""
    settings = [f"data.root={data}", f"run.out={run}", "run.device=cpu", "model.size=64"]
    settings += [f"{stage}.epochs=2", f"{stage}.batch_size=8", f"{stage}.checkpoint_seconds=0.5"]
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.argv = ["fewmask", *STAGES[stage], *settings]
    try:
        command_line()
    except SystemExit as leaving:
        os._exit(int(leaving.code or 0))
    os._exit(0)


def finish(child: int) -> int:
    """Wait for a process to end; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of the tensors that are not bit-equal."""
    a, b = load_file(left), load_file(right)
    return [name for name in sorted({*a, *b}) if name not in a or name not in b or not torch.equal(a[name], b[name])]


def attempt(stage: str, data: Path, run: Path, whole: Path, after: float) -> dict:
    """Kill one training some seconds after its log was opened, resume it, and compare."""
    shutil.rmtree(run, ignore_errors=True)
    child = start(stage, data, run)
    while not (run / stage / "log.jsonl").exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    ended = finish(child)
    found = sorted(path.name for path in (run / stage / "checkpoints").glob("step_*"))
    done = (run / stage / "stage.json").exists()
    code = finish(start(stage, data, run))
    wrong = differences(whole, run / stage / "model.safetensors") if code == 0 else ["the resumed run failed"]
    killed = ended == -signal.SIGKILL and not done
    return {"stage": stage, "after_s": round(after, 2), "killed": killed, "checkpoints": found, "different": wrong}


def main() -> None:
    """Run the kills and write one JSON; exit 1 when any weight differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/kill-resume"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    data = make_dataset(args.work / "data", 24, 24)
    rng, rows = random.Random(args.seed), []
    for stage in STAGES:
        whole = args.work / f"{stage}-whole"
        shutil.rmtree(whole, ignore_errors=True)
        assert finish(start(stage, data, whole)) == 0
        seconds = json.loads((whole / stage / "stage.json").read_text())["seconds"]
        print(f"{stage}: {seconds} s of training without interruption", flush=True)
        for _ in range(args.kills):
            after = rng.uniform(0, 0.95 * seconds)
            weights = whole / stage / "model.safetensors"
            rows.append(attempt(stage, data, args.work / f"{stage}-killed", weights, after))
            print(json.dumps(rows[-1]), flush=True)
    equal = sum(not row["different"] for row in rows)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"kills": len(rows), "bit_equal": equal, "torch": torch.__version__, "rows": rows}
    (args.out / "kill_resume.json").write_text(json.dumps(result, indent=1) + "\n")
    hit = sum(row["killed"] for row in rows)
    print(f"{equal} of {len(rows)} resumed runs are bit-equal to the uninterrupted one; {hit} were hit while training")
    raise SystemExit(equal != len(rows))


if __name__ == "__main__":
    main()

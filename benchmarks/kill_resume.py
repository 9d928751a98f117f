"""Kill -9 at random moments of pre-training and of fine-tuning, resume, and compare the weights bit by bit.

    python benchmarks/kill_resume.py --kills 20 --out benchmarks/results

Each kill starts from an empty folder, waits for a random moment of the training, sends SIGKILL, runs the same command
again until it ends, and compares `model.safetensors` with the uninterrupted run's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fewmask.data.synthetic import make_dataset

STAGES = {
    "pretrain": ["pretrain", "mae", "model.encoder=vit_tiny_patch8", "model.size=64", "pretrain.epochs=6"],
    "finetune": ["finetune", "unet", "model.size=64", "finetune.epochs=6"],
}


def command(stage: str, data: Path, run: Path) -> list[str]:
    """Return the command line of one training."""
    settings = [f"data.root={data}", f"run.out={run}", f"{stage}.checkpoint_seconds=1", "run.device=cpu"]
    return [sys.executable, "-m", "fewmask", *STAGES[stage], *settings]


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of the tensors that are not bit-equal."""
    a, b = load_file(left), load_file(right)
    return [name for name in sorted({*a, *b}) if name not in a or name not in b or not torch.equal(a[name], b[name])]


def attempt(stage: str, data: Path, work: Path, whole: Path, after: float) -> dict:
    """Kill one training some seconds after its first line in the log, resume it, and compare."""
    run = work / f"{stage}-killed"
    shutil.rmtree(run, ignore_errors=True)
    process = subprocess.Popen(command(stage, data, run), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log = run / stage / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    time.sleep(after)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = sorted(path.name for path in (run / stage / "checkpoints").glob("step_*")) if run.exists() else []
    subprocess.run(command(stage, data, run), check=True, capture_output=True)
    wrong = differences(whole, run / stage / "model.safetensors")
    return {"stage": stage, "after_s": round(after, 2), "was_running": alive, "checkpoints": found, "different": wrong}


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
        began = time.monotonic()
        subprocess.run(command(stage, data, whole), check=True, capture_output=True)
        facts = json.loads((whole / stage / "stage.json").read_text())
        print(f"{stage}: {time.monotonic() - began:.1f} s uninterrupted, {facts['seconds']} s of them training")
        for _ in range(args.kills):
            rows.append(
                attempt(stage, data, args.work, whole / stage / "model.safetensors", rng.uniform(0, facts["seconds"]))
            )
            print(json.dumps(rows[-1]), flush=True)
    equal = sum(not row["different"] for row in rows)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"kills": len(rows), "bit_equal": equal, "torch": torch.__version__, "rows": rows}
    (args.out / "kill_resume.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{equal} of {len(rows)} resumed runs are bit-equal to the uninterrupted one")
    raise SystemExit(equal != len(rows))


if __name__ == "__main__":
    main()

"""How well light segmenters of PyPI do beside `tiny_unet`: same loop, images and seconds, no trained weights.

    python -m benchmarks.light_segmenters DATA --manifest manifest_isic2017.csv --time 150s --runs RUNS

`latency.py` says how fast they are. Those that come with ImageNet weights do better with them; here none has any, as
`tiny_unet` has none. Each is trained as the recipe `unet` says, alone, with the better of `--lr` by validation, and
scored on the test split at native size. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency import REFERENCE, candidates
from fewmask.commands.prepare import prepare
from fewmask.commands.stages import configure_torch, with_precision
from fewmask.config import load_recipe, parse_time
from fewmask.data.loader import Loader
from fewmask.data.preprocess import predict_probability
from fewmask.engine.device import resolve_precision
from fewmask.engine.fit import fit
from fewmask.engine.run import Run, read_json, seed_step, versions, write_json
from fewmask.engine.stage import Stage
from fewmask.evaluate.score import score_cases, summarise
from fewmask.evaluate.validation import Validation
from fewmask.finetune.segment import Segment

SIZE = 128
NETWORKS = (
    REFERENCE, "smp Linknet, mobilenetv3_small_100", "torchvision LR-ASPP, mobilenet_v3_large",
    "smp Linknet, mobilenetv2_100",
)  # fmt: skip


def train(name: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score one network at one rate; return its figures."""
    out = args.runs / f"{name.replace(' ', '-').replace(',', '')}-{lr:g}"
    path = out / "figures.json"
    if path.exists():
        return read_json(path)
    settings = [
        f"run.seed={args.seed}", f"run.threads={args.threads}", f"run.clock={args.clock}", f"run.time={args.time}",
        f"model.size={SIZE}", f"finetune.lr={lr}", *args.setting,
    ]  # fmt: skip
    given = {"data.root": str(args.data), "data.manifest": args.manifest, "run.out": str(out)}
    recipe = with_precision(load_recipe("unet", settings, given=given))
    configure_torch(recipe)
    budget = parse_time(recipe.run.time)
    with Run(out, "finetune", recipe.resolved(), budget) as run:
        data, section = prepare(run, recipe), recipe.stage("finetune")
        seed_step(recipe.run.seed, 0, stream=2)
        objective = Segment(candidates(SIZE)[name](), size=SIZE, average=0.99)
        loader = Loader(data.dataset, data.labelled, section.batch_size, recipe.run.seed, section.min_epoch_steps)
        precision = resolve_precision(recipe.run)
        validate = Validation(data.dataset, data.validation, SIZE, precision=precision)
        stage = Stage(run, "finetune", budget, recipe.run.clock)
        network, facts = fit(objective, loader, section, stage, recipe.run, validate)
        seconds = stage.elapsed
        scored = score_cases(partial(predict_probability, network.eval(), size=SIZE), data.of_split("test"))
    figures = {
        "network": name, "lr": lr, "steps": facts["steps"], "seconds": round(seconds, 1),
        "validation_dice": facts["best_score"], "test": summarise(scored),
    }  # fmt: skip
    write_json(path, figures)
    return figures


def main() -> None:
    """Train what is not trained yet and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--network", action="append", choices=list(candidates(SIZE)), help="default: four of them")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--time", default="150s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu")
    parser.add_argument("--setting", action="append", default=[], help="a fewmask setting, key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    for name in args.network or NETWORKS:
        found = [train(name, lr, args) for lr in args.lr]
        rows.append(max(found, key=lambda figures: figures["validation_dice"]))
        dice = rows[-1]["test"]["dice"]
        print(f"{name}: Dice {dice['mean']:.4f} ({dice['low']:.4f} to {dice['high']:.4f}), {rows[-1]['steps']} steps")
        result = {"time": args.time, "clock": args.clock, "threads": args.threads, "lr": args.lr, "seed": args.seed}
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "light_segmenters.json", {**result, "versions": versions(), "rows": rows})
    print(json.dumps({row["network"]: row["test"]["dice"]["mean"] for row in rows}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

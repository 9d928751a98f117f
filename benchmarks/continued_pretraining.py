"""Does continued pre-training on unlabelled images help a mobile CNN that already has ImageNet weights?

An arm is a pre-training from the packaged ImageNet weights of EfficientNet-Lite0, or none: the control. Each is then
fine-tuned with the same recipe for the same time on the same few masks, drawn anew by each seed, and scored on the test
split. Arms are compared image by image, averaged over the seeds. A finished run is not run again.

    python -m benchmarks.continued_pretraining DATA --manifest manifest_isic2017.csv --unlabelled HAM10000 --out RUNS \\
        --arm simmim --arm "dino pretrain.lr=6e-5" --fractions 0.01 0.1 --seeds 3

An arm is a shipped recipe and settings; a name before a colon tells two of one recipe apart
("slow:dino pretrain.lr=1e-5"). Arms that differ by `run.seed` alone are several pre-trainings of a kind, and are also
compared together. `--weights NAME:FILE` is an arm that begins with weights made elsewhere, such as those of a network
that was trained with every mask: what may be hoped for at most. `--script-steps N` fine-tunes as a tutorial would, by N
steps of the script of `plain_unet.py`, at `--script-lr`, instead of with `fewmask finetune`. At a constant rate it is
chance how good the last step's weights are, so `--script-stops 5` scores each network after the last five of every
twentieth step too, and compares the means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.plain_unet import SIZE, plain
from fewmask.commands.table import average_seeds, describe_cell
from fewmask.data.manifest import load_cases
from fewmask.data.preprocess import predict_probability
from fewmask.engine.run import read_json, write_json
from fewmask.evaluate.results import write_case_csv
from fewmask.evaluate.score import compare, read_case_csv, score_cases

MODEL = ("model.encoder=efficientnet_lite0", "model.size=128")
CONTROL = "none"
CASES, STOPS = "cases_test.csv", "cases_stops.csv"  # after the last step; means over the last stops
BETWEEN = 20  # steps between two stops


def fewmask(*words: str) -> None:
    """Run a verb of fewmask with this interpreter; a failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "fewmask", *words], check=True)


def parse_arm(text: str) -> tuple[str, list[str]]:
    """Return an arm's name and its recipe with settings; a colon after a space or "=" is a setting's."""
    name, colon, rest = text.partition(":")
    named = bool(colon) and not set(name) & set(" =")
    words = shlex.split(rest if named else text)
    return (name if named else words[0]), words


def described(path: str) -> list[str]:
    """Return a file of weights by its name and content, as an arm's words: other content is another arm."""
    return [f"weights={Path(path).name}", f"sha256={hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"]


def parse_weights(text: str) -> tuple[str, str]:
    """Return an arm's name and the file that its weights are in."""
    name, colon, path = text.partition(":")
    if not (name and colon and Path(path).is_file()):
        raise SystemExit(f"--weights {text}: give a name, a colon and a file of weights.")
    return name, path


def pretrain(args: argparse.Namespace, name: str, words: list[str]) -> Path:
    """Pre-train an arm's encoder unless that is done; return its weights."""
    out = args.out / f"{name}-pretrain"
    path = out / "pretrain" / "model.safetensors"
    if not (out / "pretrain" / "stage.json").exists():
        unlabelled = json.dumps([str(folder) for folder in args.unlabelled])
        fewmask(
            "pretrain", words[0], *MODEL, "model.weights=packaged", *data_settings(args), f"run.out={out}",
            f"data.unlabelled={unlabelled}", f"run.time={args.pretrain_time}", *words[1:],
        )  # fmt: skip
    return path


def data_settings(args: argparse.Namespace) -> list[str]:
    """Return the settings that every run shares."""
    return [f"data.root={args.data}", f"data.manifest={args.manifest}", f"run.threads={args.threads}"]


def finetune(args: argparse.Namespace, name: str, weights: str, fraction: float, seed: int) -> None:
    """Fine-tune and score one cell with one seed unless that is done."""
    out = args.out / name / f"{fraction:g}-{seed}"
    if (out / CASES).exists():
        return
    if args.script_steps:
        follow_script(args, weights, fraction, seed, out)
        return
    fewmask(
        "finetune", "unet", *MODEL, f"model.weights={weights}", *data_settings(args), f"run.out={out}",
        f"run.seed={seed}", f"data.label_fraction={fraction}", f"run.time={args.finetune_time}", *args.finetune,
    )  # fmt: skip
    fewmask("evaluate", str(out), str(args.data), "--manifest", args.manifest)


def follow_script(args: argparse.Namespace, weights: str, fraction: float, seed: int, out: Path) -> None:
    """Fine-tune and score one cell as the script of `plain_unet.py` does."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = load_cases(args.data, Path(args.manifest))
    train, test = ([c for c in cases if c.split == split and c.mask] for split in ("train", "test"))
    stops = [args.script_steps - BETWEEN * back for back in range(args.script_stops)]
    rows: dict[int, list] = {}

    def look(step: int, network: torch.nn.Module) -> None:
        if step in stops:
            rows[step] = score_cases(partial(predict_probability, network.eval(), size=SIZE), test)
            network.train()

    _, figures = plain(train, math.inf, seed, fraction, weights, args.script_steps, args.script_lr, look)
    (out / "finetune").mkdir(parents=True, exist_ok=True)
    write_json(out / "finetune" / "stage.json", {"steps": args.script_steps, "lr": args.script_lr, **figures})
    if len(stops) > 1:
        write_case_csv(out / STOPS, average_seeds(rows, stops))
    write_case_csv(out / CASES, rows[args.script_steps])


def finished(args: argparse.Namespace, arm: str, fraction: float, cases: str = CASES) -> dict[int, list]:
    """Return the test rows of every finished run of an arm and a share of the masks, by seed."""
    paths = {seed: args.out / arm / f"{fraction:g}-{seed}" / cases for seed in range(args.seeds)}
    return {seed: read_case_csv(path) for seed, path in paths.items() if path.exists()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which data are learnt from, where the runs go and how many there are."""
    parser.add_argument("data", type=Path)
    parser.add_argument("--manifest", default="manifest.csv")
    parser.add_argument("--unlabelled", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")


def repeated(arms: dict[str, list[str] | None]) -> list[list[str]]:
    """Return the names of the arms that are one pre-training by several seeds, told apart by `run.seed` alone."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, words in arms.items():
        if words is not None:
            alike.setdefault(tuple(word for word in words if not word.startswith("run.seed=")), []).append(name)
    return [names for names in alike.values() if len(names) > 1]


def pooled(names: list[str], fraction: float, found: dict[tuple[str, float], dict[int, list]]) -> list[dict]:
    """Return the figures of all networks of several pre-trainings of a kind, beside the control's, once all are there.

    The interval of their mean holds the chance of pre-trainings and seeds, that of the difference the images' alone.
    """
    control = found[CONTROL, fraction]
    if not control or any(found[name, fraction].keys() != control.keys() for name in names):
        return []
    networks = dict(enumerate(rows for name in names for rows in found[name, fraction].values()))
    paired = compare(average_seeds(networks, list(networks)), average_seeds(control, list(control)))
    return [{"arms": names, "fraction": fraction, **describe_cell(networks), "difference": paired}]


def compared(args: argparse.Namespace, arms: dict[str, list[str] | None], cases: str) -> dict[str, list[dict]]:
    """Return "cells", "differences" to the control and what is "pooled", of what is finished so far."""
    cells, differences, found = [], [], {}
    for name in arms:
        for fraction in args.fractions:
            found[name, fraction] = finished(args, name, fraction, cases)
    for (name, fraction), by_seed in found.items():
        if not by_seed:
            continue
        stages = [args.out / name / f"{fraction:g}-{seed}" / "finetune" / "stage.json" for seed in by_seed]
        steps = [read_json(path)["steps"] for path in stages]
        cells.append({"arm": name, "fraction": fraction, "steps": steps, **describe_cell(by_seed)})
        control = found.get((CONTROL, fraction), {})
        if name != CONTROL and (seeds := sorted(by_seed.keys() & control.keys())):
            paired = compare(average_seeds(by_seed, seeds), average_seeds(control, seeds))
            differences.append({"arm": name, "fraction": fraction, "seeds": seeds, **paired})
    together = [row for names in repeated(arms) for share in args.fractions for row in pooled(names, share, found)]
    return {"cells": cells, "differences": differences, "pooled": together}


def table(args: argparse.Namespace, arms: dict[str, list[str] | None]) -> dict:
    """Return what is finished so far, ready for JSON; "stops" are the means over the script's stops."""
    pretrained = {name: args.out / f"{name}-pretrain" / "pretrain" / "stage.json" for name in arms}
    stops = compared(args, arms, STOPS)
    for cell in (*stops["cells"], *stops["pooled"]):
        del cell["missed"]  # is no mean, but counted after the last step
    return {
        "pretrain_time": args.pretrain_time, "finetune_time": args.finetune_time, "threads": args.threads,
        "cores": os.cpu_count(), "arms": arms, "finetune": args.finetune, "script_steps": args.script_steps,
        "script_lr": args.script_lr, "script_stops": args.script_stops, "protocol": args.protocol,
        **compared(args, arms, CASES), "stops": stops,
        "pretraining": {name: read_json(path) for name, path in pretrained.items() if path.exists()},
    }  # fmt: skip


def remember(args: argparse.Namespace, arms: dict[str, list[str] | None]) -> dict[str, list[str] | None]:
    """Write down how the arms of a folder are made, and return all of them, those of calls before too.

    It ends where one was made otherwise: its cells would be mixed.
    """
    path = args.out / "plan.json"
    if not path.exists() and (any(args.out.glob("*-pretrain")) or any(args.out.glob("*/*/cases_test.csv"))):
        raise SystemExit(f"{args.out} holds runs and does not say how they were made: name another --out.")
    names = (
        "data", "manifest", "unlabelled", "threads", "pretrain_time", "finetune_time", "script_steps", "script_lr",
        "script_stops", "finetune", "protocol",
    )  # fmt: skip
    asked = {name: json.loads(json.dumps(getattr(args, name), default=str)) for name in names}
    known = read_json(path) if path.exists() else {**asked, "arms": {}}
    before, now = ({**plan, "arms": 0} for plan in (known, asked))
    changed = [name for name in now if now[name] != before.get(name)]
    changed += [name for name, words in arms.items() if known["arms"].get(name, words) != words]
    if changed:
        raise SystemExit(f"{args.out} was begun otherwise ({', '.join(changed)} differ): name another --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    every = {**known["arms"], **arms}
    write_json(path, {**known, "arms": every})
    return every


def check(args: argparse.Namespace, names: list[str]) -> None:
    """End with a sentence where two arms have one name, or where options of the script do not go together."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"Two arms are called {', '.join(twice)} ('{CONTROL}' is the control): put NAME: before one.")
    if args.script_steps:
        if not 0 < args.script_stops <= math.ceil(args.script_steps / BETWEEN):
            raise SystemExit(
                f"--script-stops {args.script_stops}: of {args.script_steps} steps every {BETWEEN}th is one."
            )
        if args.finetune:
            raise SystemExit("--finetune is for `fewmask finetune`: leave it or --script-steps out.")
    elif args.script_stops != 1:
        raise SystemExit("--script-stops is for the script: give --script-steps too.")


def main() -> None:
    """Run the arms one after another and write table.json after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--protocol", default="ISIC-2017", help="what the tables call these data and their splits")
    parser.add_argument("--arm", action="append", default=[], help="a recipe and settings; the control always runs")
    parser.add_argument("--weights", action="append", default=[], help="an arm that begins with a file: NAME:FILE")
    parser.add_argument("--pretrain-time", default="10m")
    parser.add_argument("--finetune-time", default="4m")
    parser.add_argument("--script-steps", type=int, default=0, help="fine-tune by a plain script, so many steps of 16")
    parser.add_argument("--script-stops", type=int, default=1, help="score it after so many of every twentieth step")
    parser.add_argument("--script-lr", type=float, default=1e-3, help="the script's constant learning rate")
    parser.add_argument("--finetune", nargs="*", default=[], help="further settings of the fine-tuning")
    args = parser.parse_args()
    named = [*map(parse_weights, args.weights), *map(parse_arm, args.arm)]
    check(args, [CONTROL, *(name for name, _ in named)])
    given = dict(map(parse_weights, args.weights))
    pretrained = dict(map(parse_arm, args.arm))
    arms: dict[str, list[str] | None] = {CONTROL: None, **pretrained, **{k: described(v) for k, v in given.items()}}
    every = remember(args, arms)
    made = {name: str(pretrain(args, name, words)) for name, words in pretrained.items()}
    weights = {CONTROL: "packaged", **made, **given}
    for seed in range(args.seeds):
        for fraction in args.fractions:
            for name in arms:
                finetune(args, name, weights[name], fraction, seed)
                write_json(args.out / "table.json", table(args, every))
    for cell in table(args, every)["cells"]:
        print(f"{cell['arm']} {cell['fraction']:g}: Dice {cell['dice']['mean']:.4f}, {cell['dice']['per_seed']}")


if __name__ == "__main__":
    main()

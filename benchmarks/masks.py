"""What structure costs: masks and exterior conversion as shares of a training step, and SLIC for a folder of images.

    python -m benchmarks.masks --data DATA --num 1000 --threads 1 --out benchmarks/results

Each step is `engine.fit`'s own, views included, at the settings of the shipped recipe; the parts are timed inside it,
in the same process. A mask that follows superpixels costs its choice and, in the views, moving the label map with the
crop; the maps themselves are made once for a data set, which the last part times at cache size, into an empty cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import build_loop, build_objective, one_step, raw_batch, take_turns
from fewmask.config import RunSection, load_recipe
from fewmask.data.cache import build_cache
from fewmask.data.contents import default_cache_folder
from fewmask.data.geometry import random_boxes
from fewmask.data.manifest import load_cases
from fewmask.data.superpixels import Slic, superpixel_maps
from fewmask.engine.device import resolve_precision
from fewmask.engine.fit import Fit
from fewmask.engine.run import versions, write_json
from fewmask.engine.stage import CLOCKS
from fewmask.pretrain.crops import move_map
from fewmask.pretrain.structure import MaskName

MASKS: tuple[MaskName, ...] = ("random", "semantic", "semantic_focal")
CONVERSIONS = ("gin", "randconv")


class Timed:
    """Something that is called, and the seconds that its calls took; its attributes are those of what it wraps."""

    def __init__(self, inner: Any, now: Callable[[], float]) -> None:
        self.inner, self.now, self.seconds = inner, now, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        began = self.now()
        answer = self.inner(*args)
        self.seconds += self.now() - began
        return answer


def recipe_loop(name: str, part: str, args: argparse.Namespace, folder: Path, **changed: Any) -> tuple[Fit, Timed]:
    """Return a shipped recipe's loop with some settings changed, and the timer around one of its objective's parts."""
    recipe = load_recipe(name)
    section = recipe.stage("pretrain")
    num = args.batch or section.batch_size
    settings = {**section.method, **changed}
    objective: Any = build_objective(settings.pop("name"), recipe.model.encoder, recipe.model.size, **settings)
    timer = Timed(getattr(objective, part), CLOCKS[args.clock])
    setattr(objective, part, timer)
    raw = raw_batch(num, recipe.model.size, objective.maps().get("superpixels"))
    section = section.model_copy(update={"batch_size": num})
    return build_loop(objective, raw, section, args.precision, folder), timer


def share_of_steps(loop: Fit, timer: Timed, rounds: int) -> dict[str, float]:
    """Return the median seconds of a step and of the timed part, and the median of their ratio."""
    whole, part = [], []
    for number in range(rounds + 1):
        timer.seconds = 0.0
        began = timer.now()
        one_step(loop)
        if number:
            whole.append(timer.now() - began)
            part.append(timer.seconds)
    share = statistics.median(p / w for p, w in zip(part, whole, strict=True))
    return {"step_s": statistics.median(whole), "part_s": statistics.median(part), "share": share}


def mask_cost(recipe: str, mask: MaskName, args: argparse.Namespace, folder: Path) -> dict:
    """Return what one kind of mask costs in one recipe."""
    loop, timer = recipe_loop(recipe, "masking", args, folder, mask=mask)
    row = share_of_steps(loop, timer, args.rounds)
    maps = loop.loader.batch(0).extra.get("superpixels")
    move = 0.0 if maps is None else seconds_to_move(maps, load_recipe(recipe).model.size, args)
    return {"recipe": recipe, "mask": mask, **row, "move_s": move, "share": row["share"] + move / row["step_s"]}


def seconds_to_move(maps: torch.Tensor, size: int, args: argparse.Namespace) -> float:
    """Return the median seconds to crop a batch's label maps."""
    boxes = random_boxes(len(maps), (0.2, 1.0), (3 / 4, 4 / 3))
    return take_turns({"move": partial(move_map, maps, boxes, size)}, args.rounds, CLOCKS[args.clock])["move"]


def conversion_cost(conversion: str, args: argparse.Namespace, folder: Path) -> dict:
    """Return what one kind of exterior conversion costs in TEDMAE's recipe."""
    loop, timer = recipe_loop("tedmae", "conversion", args, folder, conversion=conversion)
    return {"recipe": "tedmae", "conversion": conversion, **share_of_steps(loop, timer, args.rounds)}


def slic_cost(args: argparse.Namespace) -> dict:
    """Return the seconds that the superpixels of a folder take, and those of reading them again."""
    cases = load_cases(args.data)
    chosen = cases[: args.num]
    root = default_cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    # The clock of this process does not see the time of its children.
    now = CLOCKS[args.clock] if args.threads == 1 else time.perf_counter
    with tempfile.TemporaryDirectory(dir=root) as folder:
        dataset = build_cache(chosen, args.size, Path(folder), args.threads)
        taken, made = [], []
        for _ in range(2):
            began = now()
            maps = superpixel_maps(dataset, Slic(), args.threads)
            taken.append(now() - began)
            made.append([path.stat().st_mtime_ns for path in Path(folder).rglob("superpixels-*.npy")])
        num_regions = statistics.mean(int(labels.max()) + 1 for labels in maps[:100])
    each = taken[0] / len(chosen)
    return {
        "num_images": len(chosen), "side": dataset.images.shape[1], "processes": args.threads, "build_s": taken[0],
        "ms_per_image": 1000 * each, "whole_folder_images": len(cases), "whole_folder_s": each * len(cases),
        "read_s": taken[1], "read_from_cache": made[0] == made[1] != [], "mean_regions": num_regions,
    }  # fmt: skip


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images for SLIC; without it that part is left out")
    parser.add_argument("--num", type=int, default=1000, help="images of the folder to segment")
    parser.add_argument("--size", type=int, default=128, help="training size the cache is made for")
    parser.add_argument("--threads", type=int, default=1, help="threads of a step; processes of SLIC")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0, help="0: the recipes' own")
    parser.add_argument("--precision", default=resolve_precision(RunSection(device="cpu")))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in ("mae", "g2ll"):
            rows += [mask_cost(recipe, mask, args, Path(scratch)) for mask in MASKS]
        rows += [conversion_cost(conversion, args, Path(scratch)) for conversion in CONVERSIONS]
    for row in rows:
        print(f"{row['recipe']} {row.get('mask') or row['conversion']}: {row['share']:.2%} of {row['step_s']:.2f} s")
    result = {
        "threads": args.threads, "rounds": args.rounds, "clock": args.clock, "precision": args.precision,
        "machine": platform.processor(), "cores": os.cpu_count(), "versions": versions(), "rows": rows,
    }  # fmt: skip
    if args.data is not None:
        result["slic"] = slic_cost(args)
        print(
            f"SLIC: {result['slic']['ms_per_image']:.1f} ms an image, {result['slic']['whole_folder_s']:.0f} s for "
            f"{result['slic']['whole_folder_images']}; again, from the cache: {result['slic']['read_s']:.3f} s"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "masks.json", result)


if __name__ == "__main__":
    main()

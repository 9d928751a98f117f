"""`fewmask pretrain`, `finetune` and `distill`: one stage of the chain on its own, into the same run layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fewmask.commands.defaults import method_defaults
from fewmask.commands.distillation import distill
from fewmask.commands.prepare import prepare
from fewmask.commands.stages import configure_torch, finetune, pretrain, with_precision
from fewmask.config import load_recipe, parse_time
from fewmask.engine.run import Run, interruptible, is_main


def stage(name: str, recipe_name: str, overrides: Iterable[str]) -> int:
    """Run one stage of a recipe; `run.time` is the time of this stage's training."""
    recipe = with_precision(load_recipe(recipe_name, overrides, stage=name))
    recipe.stage(name)
    out = recipe.run.out or Path("runs") / f"{Path(recipe_name).stem}-{name}"
    configure_torch(recipe)
    budget = parse_time(recipe.run.time)
    with Run(out, name, recipe.resolved(), budget, method_defaults(recipe, [name])) as folder, interruptible(folder):
        data = prepare(folder, recipe, needs_masks=name != "pretrain")
        if name == "pretrain":
            path = pretrain(folder, recipe, data, budget)
        elif name == "distill":
            assert recipe.distill is not None
            path = distill(folder, recipe, data, recipe.distill.teachers, budget)
        else:
            path = finetune(folder, recipe, data, recipe.model.weights, budget)
    if is_main():
        print(f"{name} is done: {path}")
    return 0

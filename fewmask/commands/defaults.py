"""What the settings of a recipe's methods are where it is silent: a run keeps them, as a version may change them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fewmask.auxiliary import AUXILIARY
from fewmask.config import STAGES, Recipe
from fewmask.distill import DISTILLERS
from fewmask.distill.distill import DEFAULT_WEIGHTS, Distill
from fewmask.engine.run import leaves
from fewmask.finetune import FINETUNERS
from fewmask.pretrain import PRETRAINERS
from fewmask.registry import choose

METHODS: dict[str, dict[str, Any]] = {
    "pretrain": dict(PRETRAINERS),
    "finetune": dict(FINETUNERS),
    "distill": {"distill": Distill},
}
_SUPPLIED = ("num_classes", "size")  # by the program: no recipe sets them


def method_defaults(recipe: Recipe, stages: Iterable[str] = STAGES) -> dict[str, dict[str, Any]]:
    """Return what the methods of these stages take for what a recipe does not say, in the recipe's own layout.

    The losses of a distillation and the tasks of joint training are told of as well. Raises UserError for a method, a
    loss or a task that there is none of.
    """
    sections = {stage: section for stage in stages if (section := getattr(recipe, stage)) is not None}
    named = {stage: {"method": section.method, "instead": section.instead} for stage, section in sections.items()}
    return {
        stage: {key: _of(stage, method) for key, method in methods.items() if isinstance(method, dict)}
        for stage, methods in named.items()
    }


def defaults_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return what a factory takes for the settings that it is not given."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in _SUPPLIED}


def changed_defaults(info: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    """Return what a run was not told and this version takes otherwise: by dotted setting, its value then and now.

    `info` is what its run.json holds, `now` what `method_defaults` returns for its recipe. None where the run does not
    say what its defaults were, as those of earlier versions do not.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for stage, defaults in json.loads(json.dumps(now, default=str)).items():
        if not (kept := info.get("defaults", {}).get(stage)):
            return None
        then, today, told = leaves(kept), leaves(defaults), leaves(info["config"].get(stage))
        silent = (then.keys() & today.keys()) - told.keys()
        found |= {f"{stage}.{key}": (then[key], today[key]) for key in sorted(silent) if then[key] != today[key]}
    return found


def _of(stage: str, method: Mapping[str, Any]) -> dict[str, Any]:
    found = defaults_of(choose(METHODS[stage], method["name"], f"{stage} method"))
    losses = method.get("losses", found.get("losses"))
    if isinstance(losses, Mapping):  # anything else is refused, in a sentence, where the method is built
        found["losses"] = {name: _of_loss(name) for name in losses}
    if "task" in method:
        found["task_settings"] = _of_tasks(method["task"])
    return found


def _of_tasks(task: object) -> dict[str, Any]:
    if isinstance(task, str):
        return defaults_of(choose(AUXILIARY, task, "auxiliary task"))
    return {name: _of_tasks(name) for name in task if isinstance(name, str)} if isinstance(task, list) else {}


def _of_loss(name: str) -> dict[str, Any]:
    return {"weight": DEFAULT_WEIGHTS.get(name, 1.0), **defaults_of(choose(DISTILLERS, name, "distillation loss"))}

"""`fewmask select`: for each auxiliary task the better of its modes, by validation Dice alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewmask.auxiliary import AUXILIARY
from fewmask.commands.defaults import method_defaults
from fewmask.commands.prepare import Prepared, prepare
from fewmask.commands.stages import configure_torch, finetune, pretrain, with_precision
from fewmask.config import Recipe, SelectSection, load_recipe, parse_time
from fewmask.engine.run import Run, interruptible, is_main, read_json, write_json
from fewmask.engine.stage import Progress
from fewmask.registry import choose
from fewmask.types import UserError

SELECTION = "selection.json"


@dataclass(frozen=True)
class Candidate:
    """A task in one mode; `weight` is lambda, 0 in the pre-training mode, which has none."""

    task: str
    mode: str
    weight: float = 0.0

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.mode}-{self.task}" + (f"-{self.weight:g}" if self.mode == "joint" else "")


def select(recipe_name: str, overrides: Iterable[str], as_json: bool = False) -> int:
    """Train every candidate that is not finished, and write `selection.json` after each; exit code 0."""
    recipe = with_precision(load_recipe(recipe_name, overrides))
    section = recipe.select or SelectSection()
    out = recipe.run.out or Path("runs") / f"{Path(recipe_name).stem}-select"
    jobs = list(candidates(section))
    check_shares(recipe, jobs)
    recipes = {job: recipe_of(recipe, section, job) for job in jobs}
    configure_torch(recipe)
    with Run(out, "select", recipe.resolved()) as run, interruptible(run):
        data = prepare(run, recipe)
        line = Progress("select")
        for number, job in enumerate(jobs, start=1):
            train(run, recipes[job], data, job)
            found = selection(out, jobs)
            if is_main():
                write_json(out / SELECTION, found)
            line.update(
                number / len(jobs),
                _said(next(row for row in found["candidates"] if row["name"] == job.name)),
                force=True,
            )
    if is_main():
        print(json.dumps(found) if as_json else _summary(out, found))
    return 0


def candidates(section: SelectSection) -> Iterator[Candidate]:
    """Yield every task in every mode asked for, the joint one with every weight."""
    for task in section.tasks:
        choose(AUXILIARY, task, "auxiliary task")
        if "joint" in section.modes:
            yield from (Candidate(task, "joint", weight) for weight in section.weights)
        if "pretrain" in section.modes:
            yield Candidate(task, "pretrain")
    if not (section.tasks and section.modes and (section.weights or "joint" not in section.modes)):
        raise UserError("There is nothing to select from; give select.tasks, select.modes and select.weights.")


def check_shares(recipe: Recipe, jobs: Iterable[Candidate]) -> None:
    """Raise a UserError where a pre-training would leave its fine-tuning no time."""
    timed = parse_time(recipe.run.time) is not None
    if timed and recipe.stage("pretrain").share == 1 and any(job.mode == "pretrain" for job in jobs):
        raise UserError(
            "pretrain.share is 1, so that the pre-training of a task takes all of run.time and its fine-tuning has "
            "none: give a share below 1, such as 0.5, or run.time=none."
        )


def recipe_of(recipe: Recipe, section: SelectSection, job: Candidate) -> Recipe:
    """Return the recipe of a candidate's training: that of the whole, with the task as a method."""
    settings = section.task_settings.get(job.task, {})
    fine = recipe.stage("finetune")
    if job.mode == "pretrain":
        method = {"name": job.task, **settings}
        return recipe.model_copy(update={"pretrain": recipe.stage("pretrain").model_copy(update={"method": method})})
    segment = {key: value for key, value in fine.method.items() if key != "name"}
    method = {**segment, "name": "joint", "task": job.task, "task_weight": job.weight, "task_settings": settings}
    return recipe.model_copy(update={"finetune": fine.model_copy(update={"method": method})})


def train(run: Run, recipe: Recipe, data: Prepared, job: Candidate) -> None:
    """Train a candidate in its own folder within the run, unless that is done; other settings raise a UserError."""
    folder = run.folder / "candidates" / job.name
    budget = parse_time(recipe.run.time)
    share = recipe.stage("pretrain").share if job.mode == "pretrain" else 0.0
    defaults = method_defaults(recipe, ["pretrain", "finetune"] if job.mode == "pretrain" else ["finetune"])
    with Run(folder, "select", recipe.resolved(), budget, defaults) as own, interruptible(own):
        own.compare_data(run.info["data"])
        own.record_data(run.info["data"])
        weights = recipe.model.weights
        if job.mode == "pretrain":
            weights = str(pretrain(own, recipe, data, budget and budget * share))
        finetune(own, recipe, data, weights, budget and budget * (1 - share))
    run.check_stop()


def selection(out: Path, jobs: Sequence[Candidate]) -> dict[str, Any]:
    """Return every finished candidate with its validation Dice, and the chosen one of each task.

    The better mode of a task is the one with the higher validation Dice; a tie goes to joint (ours), and among equal
    weights to the smallest.
    """
    rows = []
    for job in jobs:
        path = out / "candidates" / job.name / "finetune" / "stage.json"
        if path.exists():
            score = read_json(path)["best_score"]
            rows.append({"name": job.name, **asdict(job), "score": score, "folder": f"candidates/{job.name}"})
    chosen: dict[str, str] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        chosen[task] = max(of_task, key=lambda row: (row["score"], row["mode"] == "joint", -row["weight"]))["name"]
    complete = len(rows) == len(jobs)
    return {"metric": "validation Dice", "complete": complete, "candidates": rows, "chosen": chosen}


def chosen_folders(selected: Path) -> list[Path]:
    """Return the run folders of the chosen candidates of a selection's folder."""
    found = read_json(selected / SELECTION)
    if not found["complete"]:
        raise UserError(
            f"The selection in {selected} is not finished; run its 'fewmask select' command to the end first."
        )
    return [selected / "candidates" / name for name in found["chosen"].values()]


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['name']}: validation Dice {row['score']:.4f}"


def _summary(out: Path, found: Mapping[str, Any]) -> str:
    scores = {row["name"]: row["score"] for row in found["candidates"]}
    lines = [f"{task}: {name}, validation Dice {scores[name]:.4f}" for task, name in found["chosen"].items()]
    return "\n".join([*lines, f"selection: {out / SELECTION}"])

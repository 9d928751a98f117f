"""One piece of a grid's work: a training, or a scoring, with a run folder of its own; done once however often asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewmask.commands.distillation import distill, find_teachers
from fewmask.commands.ensemble import EnsemblePredictor, evaluate_ensemble
from fewmask.commands.evaluate import evaluate_cases
from fewmask.commands.prepare import Prepared, prepare
from fewmask.commands.stages import configure_torch, finetune, pretrain
from fewmask.config import Recipe, parse_time
from fewmask.engine.run import Run, interruptible, is_main, read_json
from fewmask.engine.stage import Stage
from fewmask.evaluate.results import read_metrics
from fewmask.types import Case, UserError

Verb = Literal["pretrain", "finetune", "distill", "ensemble"]


class NotTrainedError(UserError):
    """A training stopped for a reason of its own (a collapse, a loss that is not finite): a result, not an end."""


@dataclass(frozen=True)
class Job:
    """What is done in one run folder, with which recipe, and from what earlier jobs left.

    `weights` is the model file a fine-tuning's encoder starts from, None for the recipe's; `teachers` are run folders
    or model files: whom a distillation learns from, or an ensemble's members. All but a pre-training are scored.
    """

    folder: Path
    verb: Verb
    recipe: Recipe
    weights: Path | None = None
    teachers: tuple[Path, ...] = ()

    @property
    def model(self) -> Path:
        """The model file that a training leaves."""
        return self.folder / self.verb / "model.safetensors"

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the finished training did, None while it is not finished."""
        return stage_facts(self.folder, self.verb)

    def config(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged; an ensemble's members are known by their content."""
        members = {"members": fingerprints(self.teachers)} if self.verb == "ensemble" else {}
        return {**self.recipe.resolved(), **({"ensemble": members} if members else {})}


def run_job(job: Job, unseen: Sequence[Case] = ()) -> None:
    """Train and score as the job says, unless that is done.

    Raises NotTrainedError when a pre-training or distillation itself ends badly, and UserError for a folder of other
    settings or data, or a fine-tuning that ends badly, without which nothing can be said of its row.
    """
    budget = parse_time(job.recipe.run.time)
    with Run(job.folder, job.verb, job.config(), budget) as run, interruptible(run):
        missing = set() if job.verb == "pretrain" else {"test", *(["unseen"] if unseen else [])} - scored(job.folder)
        if not missing and (job.verb != "pretrain" or job.facts):
            return
        configure_torch(job.recipe)
        data = prepare(run, job.recipe)
        train(job, run, data, budget)
        for key, cases in (("test", data.of_split("test")), ("unseen", unseen)):
            if is_main() and key in missing:
                score(job, cases, key)
                run.check_stop()


def train(job: Job, run: Run, data: Prepared, budget: float | None) -> None:
    """Do a job's training; an ensemble has none, and is written down."""
    if job.verb == "finetune":
        finetune(run, job.recipe, data, str(job.weights or job.recipe.model.weights), budget)
    elif job.verb == "ensemble":
        Stage(run, "ensemble").finish(members=[str(path) for path in job.teachers])
    else:
        _train_or_tell(job, run, data, budget)


def _train_or_tell(job: Job, run: Run, data: Prepared, budget: float | None) -> None:
    try:
        if job.verb == "pretrain":
            pretrain(run, job.recipe, data, budget)
        else:
            distill(run, job.recipe, data, job.teachers, budget)
    except UserError as error:
        raise NotTrainedError(str(error)) from None


def score(job: Job, cases: Sequence[Case], key: str) -> None:
    """Score a job's segmenter, or the average of its teachers, on cases under a key."""
    if job.verb == "ensemble":
        evaluate_ensemble(job.folder, EnsemblePredictor(model_files(job.teachers)), cases, key)
    else:
        evaluate_cases(job.folder, cases, key)


def model_files(teachers: Iterable[Path]) -> list[Path]:
    """Return the model files meant by teachers: model files, run folders, or folders of a selection."""
    return [file for path in teachers for file in find_teachers(path)]


def fingerprints(teachers: Iterable[Path]) -> list[str]:
    """Return 16 hex digits for the content of each teacher's model file."""
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in model_files(teachers)]


def scored(folder: Path) -> set[str]:
    """Return the data sets a run has been scored on."""
    path = folder / "metrics.json"
    return set(read_metrics(path)) if path.exists() else set()


def stage_facts(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return the stage.json of a run's stage, None while it is not finished."""
    path = folder / stage / "stage.json"
    return read_json(path) if path.exists() else None

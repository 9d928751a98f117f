"""One piece of a grid's work: a training, or a scoring, with a run folder of its own; done once however often asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewmask.commands.defaults import method_defaults
from fewmask.commands.distillation import digests_of, distill, find_teachers
from fewmask.commands.ensemble import EnsemblePredictor
from fewmask.commands.evaluate import evaluate_cases, score_into, scoring_device
from fewmask.commands.prepare import Prepared, prepare
from fewmask.commands.select import SELECTION, candidates, recipe_of, selection
from fewmask.commands.select import train as train_candidate
from fewmask.commands.stages import configure_torch, finetune, pretrain
from fewmask.config import Recipe, parse_time
from fewmask.engine.run import Run, interruptible, is_main, read_json, wait_for_everyone, write_json
from fewmask.engine.stage import Stage
from fewmask.evaluate.results import read_metrics
from fewmask.types import Case, NotTrainedError, UserError

Verb = Literal["pretrain", "finetune", "distill", "ensemble", "select"]


METHODS_OF: dict[Verb, list[str]] = {"select": ["pretrain", "finetune"], "ensemble": []}
"""The stages whose methods a verb trains by, where they are not of its name."""


@dataclass(frozen=True)
class Job:
    """What is done in one run folder, with which recipe, and from what earlier jobs left.

    `weights` is the model file a fine-tuning starts from, None for the recipe's; `teachers` are run folders
    or model files or a selection's folder: whom a distillation learns from, or an ensemble's members. With `candidate`,
    (task, mode) or ("", "") for the best, the only member is that candidate of the selection. Pre-trainings and
    selections are not scored, nor what is not to be (`scored`).
    """

    folder: Path
    verb: Verb
    recipe: Recipe
    weights: Path | None = None
    teachers: tuple[Path, ...] = ()
    candidate: tuple[str, str] | None = None
    scored: bool = True

    @property
    def serves_cells(self) -> bool:
        """Whether it is a step towards what other jobs score, and has no scores of its own."""
        return not self.scored or self.verb in ("pretrain", "select")

    @property
    def members(self) -> list[Path]:
        """The model files of the teachers; those of a selection are known once it is done."""
        if self.candidate is None:
            return model_files(self.teachers)
        return model_files([best_candidate(self.teachers[0], *self.candidate)])

    @property
    def model(self) -> Path:
        """The model file that a training leaves."""
        return self.folder / self.verb / "model.safetensors"

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the finished training did, None while it is not finished."""
        return stage_facts(self.folder, self.verb)

    @property
    def defaults(self) -> dict[str, Any]:
        """What its methods take, in this version, for what the recipe does not say, by stage."""
        return method_defaults(self.recipe, METHODS_OF.get(self.verb, [self.verb]))

    def config(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged; an ensemble's members are known by their content."""
        members = {"members": fingerprints(self.members)} if self.verb == "ensemble" else {}
        return {**self.recipe.resolved(), **({"ensemble": members} if members else {})}


def run_job(job: Job, unseen: Sequence[Case] = ()) -> None:
    """Train and score as the job says, unless that is done.

    Raises NotTrainedError when a training of anything but a plain segmenter ends by what it learnt, and a UserError
    that is none of these for a plain segmenter's, without which there is nothing to compare, and for all else: a folder
    of other settings or data, a full disk.
    """
    # A selection's time is that of each of its candidates.
    budget = parse_time(job.recipe.run.time)
    with Run(job.folder, job.verb, job.config(), budget, job.defaults) as run, interruptible(run):
        if is_done(job, unseen):
            return
        configure_torch(job.recipe)
        data = prepare(run, job.recipe)
        train(job, run, data, budget)
        for key, cases in (("test", data.of_split("test")), ("unseen", unseen)):
            if is_main() and key in unscored(job, unseen):
                score(job, cases, key)
                run.check_stop()


def unscored(job: Job, unseen: Sequence[Case]) -> set[str]:
    """Return the sets of images that a job is still to be scored on."""
    wanted = set() if job.serves_cells else {"test", *(["unseen"] if unseen else [])}
    return wanted - scored(job.folder)


def is_done(job: Job, unseen: Sequence[Case]) -> bool:
    """Return whether nothing is left to do of a job."""
    return not unscored(job, unseen) and bool(job.facts or not job.serves_cells)


def train(job: Job, run: Run, data: Prepared, budget: float | None) -> None:
    """Do a job's training; an ensemble has none, and is written down."""
    if job.verb == "ensemble":
        Stage(run, "ensemble").finish(members=[str(path) for path in job.members])
    elif job.verb == "finetune" and job.recipe.stage("finetune").method["name"] == "segment":
        try:
            _train(job, run, data, budget)
        except NotTrainedError as error:
            raise UserError(str(error)) from None
    else:
        _train(job, run, data, budget)


def _train(job: Job, run: Run, data: Prepared, budget: float | None) -> None:
    if job.verb == "pretrain":
        pretrain(run, job.recipe, data, budget)
    elif job.verb == "finetune":
        finetune(run, job.recipe, data, str(job.weights or job.recipe.model.weights), budget)
    elif job.verb == "select":
        _select(job, run, data)
    else:
        distill(run, job.recipe, data, job.teachers, budget)


def _select(job: Job, run: Run, data: Prepared) -> None:
    """Train every candidate of a selection, and write down which is the best of each task."""
    section = job.recipe.select
    assert section is not None
    wanted = list(candidates(section))
    for candidate in wanted:
        train_candidate(run, recipe_of(job.recipe, section, candidate), data, candidate)
    if is_main():
        found = selection(run.folder, wanted)
        write_json(run.folder / SELECTION, found)
        Stage(run, "select").finish(chosen=found["chosen"])
    wait_for_everyone()


def best_candidate(selected: Path, task: str, mode: str) -> Path:
    """Return the run folder of the best candidate of a task in a mode, or of all the chosen where both are "".

    The best has the highest validation Dice; a tie goes to the smaller weight, then to the task that comes first.
    """
    found = read_json(selected / SELECTION)
    chosen = set(found["chosen"].values())
    rows = [
        row
        for row in found["candidates"]
        if (task in (row["task"], "") and mode in (row["mode"], "") and (task or row["name"] in chosen))
    ]
    if not rows:
        raise UserError(f"{selected / SELECTION} has no candidate '{mode}-{task}'; delete {selected} to select anew.")
    best: dict[str, Any] = max(rows, key=lambda row: (row["score"], -row["weight"]))
    return selected / str(best["folder"])


def score(job: Job, cases: Sequence[Case], key: str) -> None:
    """Score a job's segmenter, or the average of its teachers, on cases under a key."""
    if job.verb == "ensemble":
        device = scoring_device(job.recipe.run.device)
        score_into(job.folder, EnsemblePredictor(job.members, device), cases, key)
    else:
        evaluate_cases(job.folder, cases, key)


def model_files(teachers: Iterable[Path]) -> list[Path]:
    """Return the model files meant by teachers: model files, run folders, or folders of a selection."""
    return [file for path in teachers for file in find_teachers(path)]


def fingerprints(teachers: Iterable[Path]) -> list[str]:
    """Return 16 hex digits for the content of each teacher's model file."""
    return digests_of(model_files(teachers))


def scored(folder: Path) -> set[str]:
    """Return the data sets a run has been scored on."""
    path = folder / "metrics.json"
    return set(read_metrics(path)) if path.exists() else set()


def stage_facts(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return the stage.json of a run's stage, None while it is not finished."""
    path = folder / stage / "stage.json"
    return read_json(path) if path.exists() else None

"""`fewmask run`: check, pretrain, finetune, distill, evaluate, export, report; what is done is not done again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewmask.commands.defaults import method_defaults
from fewmask.commands.distillation import (
    check_before_training,
    compare_student,
    digests_of,
    distill,
    lost_and_gained,
    unmasked,
)
from fewmask.commands.evaluate import evaluate_cases, sentence
from fewmask.commands.export import export_run
from fewmask.commands.prepare import Prepared, prepare
from fewmask.commands.stages import configure_torch, finetune, objective_for, pretrain, with_precision
from fewmask.config import Recipe, StageSection, load_recipe, parse_time
from fewmask.deploy.latency import measure_latency
from fewmask.engine.checkpoint import checkpoints
from fewmask.engine.run import Run, interruptible, is_main, read_json, write_json
from fewmask.engine.stage import Progress, Stage
from fewmask.objective import Objective
from fewmask.pretrain.figure import LEAST_TOLD, Figure
from fewmask.report.build import build_report
from fewmask.types import UserError

RESERVE_SECONDS = 30.0  # start, audit, cache, export and report
LATENCY_SECONDS = 0.3  # a row of the latency table; `fewmask export` takes longer and is surer
CHOICE = "method.json"
NUM_COMPARED = 200
LEAST_AGREEMENT = 0.6
SECONDS_PER_CASE = 0.1  # reading, predicting and measuring one image of the final evaluation


def run(
    data: Path,
    out: Path,
    manifest: str | None = None,
    unlabelled: Iterable[Path] = (),
    overrides: Iterable[str] = (),
    recipe_name: str = "run",
    as_json: bool = False,
) -> int:
    """Do the whole chain on a folder and leave `model.onnx`, `report.html` and `metrics.json` in `out`."""
    given: dict[str, Any] = {"data.root": str(data), "run.out": str(out)}
    if manifest:
        given["data.manifest"] = manifest
    if unlabelled:
        given["data.unlabelled"] = [str(path) for path in unlabelled]
    overrides = list(overrides)
    for text in overrides:
        if (key := text.partition("=")[0]) in given:
            raise UserError(f"'{text}' contradicts the command line, which already says {key}={given[key]}.")
    recipe = with_precision(load_recipe(recipe_name, overrides, given=given))
    chain(recipe, out)
    if not is_main():
        return 0
    metrics = read_json(out / "metrics.json")
    if as_json:
        print(json.dumps({"run": str(out), "metrics": metrics}))
        return 0
    for split, summary in metrics.items():
        print(sentence(split, summary))
    print(f"model:  {out / 'model.onnx'}\nreport: {out / 'report.html'}")
    return 0


def chain(recipe: Recipe, out: Path) -> None:
    """Run every stage of a recipe into a folder, resuming at the one where it stopped."""
    configure_torch(recipe)
    # A mistyped setting is told now and not after hours of pre-training.
    stand_in = objective_for("finetune", recipe, "none").product()
    pretrains = recipe.pretrain is not None and recipe.pretrain.epochs > 0
    before = objective_for("pretrain", recipe, "none", num_classes=2) if pretrains else None
    if isinstance(before, Figure):
        check_instead(recipe)
    distils = recipe.distill is not None and recipe.distill.epochs > 0
    if distils:
        check_before_training(recipe, stand_in)
    if recipe.run.clock == "cpu" and recipe.run.time != "none":
        raise UserError(
            "run.clock=cpu is for one stage alone, and a chain shares out wall time; leave one of them out."
        )
    with (
        Run(out, "run", recipe.resolved(), parse_time(recipe.run.time), method_defaults(recipe)) as folder,
        interruptible(folder),
    ):
        prepared = prepare(folder, recipe)
        if recipe.distill is not None and distils:
            unmasked(recipe.distill, prepared)  # a mistake is told now and not after hours of training the teacher
        weights = recipe.model.weights
        if before is not None and worth_pretraining(recipe, prepared):
            if not Stage(folder, "pretrain").done:
                recipe = settled(folder, recipe, prepared, before)
            share = recipe.stage("pretrain").share
            weights = str(pretrain(folder, recipe, prepared, time_for(folder, prepared, share)))
        share = share_of_teacher(recipe.stage("finetune")) if distils else 1.0
        teacher = finetune(folder, recipe, prepared, weights, time_for(folder, prepared, share))
        if recipe.distill is not None and distils:
            teachers = recipe.distill.teachers or [teacher]
            distill(folder, recipe, prepared, teachers, time_for(folder, prepared))
        if is_main():
            deliver(folder, prepared)
    if is_main():
        report(out)


def share_of_teacher(section: StageSection) -> float:
    """Return what a teacher's fine-tuning gets of the time that it shares with its student, half unless told (ours)."""
    return section.share if "share" in section.model_fields_set else 0.5


def worth_pretraining(recipe: Recipe, data: Prepared) -> bool:
    """Return whether there is something to learn before the masks: unlabelled images, or an encoder without weights."""
    if recipe.model.weights == "none" or len(data.body) > len(data.labelled):
        return True
    Progress("pretrain").close("left out: every image has a mask, and the encoder starts from trained weights")
    return False


def settled(folder: Run, recipe: Recipe, data: Prepared, objective: Objective) -> Recipe:
    """Return the recipe as `suited` has it, by the answer under which a pre-training that goes on has begun.

    That answer is kept with the stage: what is trained by one method cannot go on by another.
    """
    stage = folder.folder / "pretrain"
    if isinstance(objective, Figure) and (stage / CHOICE).exists() and checkpoints(stage / "checkpoints"):
        return with_instead(recipe) if read_json(stage / CHOICE)["instead"] else recipe
    found = suited(recipe, data, objective)
    if is_main() and isinstance(objective, Figure):
        stage.mkdir(exist_ok=True)
        write_json(stage / CHOICE, {"instead": found is not recipe})
    return found


def suited(recipe: Recipe, data: Prepared, objective: Objective) -> Recipe:
    """Return the recipe, pre-training by its `instead` where figures are not what the masks mark, or hardly found.

    Our choice: at most 200 of the training masks are looked at, and a mean Dice of 0.6 is asked for, which lesions in
    two sets have (0.7, 0.8) and lungs in X-rays do not (0.3); of at most 200 of the images to pre-train on, twice the
    share must have a figure that the training asks of all of them, so that it does not end in the middle.
    """
    section = recipe.stage("pretrain")
    if not isinstance(objective, Figure) or section.instead == "none":
        return recipe
    assert data.dataset.masks is not None
    found = objective.agreement(data.dataset.images, data.dataset.masks, some_of(data.labelled))
    share = objective.share_told(data.dataset.images, some_of(data.body))
    told = (
        f"a threshold on colours has a Dice of {found:.2f} with your masks, and finds a thing in {share:.0%} of images"
    )
    line = Progress("pretrain")
    if found >= LEAST_AGREEMENT and share >= 2 * LEAST_TOLD:
        line.close(f"by method 'figure': {told}")
        return recipe
    other = with_instead(recipe)
    rate = f"pretrain.{other.stage('pretrain').rate}={other.stage('pretrain').lr:g}"
    line.close(f"by method '{section.instead['name']}' instead of 'figure', {rate}: {told}")
    return other


def some_of(rows: list[int]) -> list[int]:
    """Return at most 200 of the rows, evenly."""
    return rows[:: max(1, math.ceil(len(rows) / NUM_COMPARED))]


def with_instead(recipe: Recipe) -> Recipe:
    """Return the recipe with the other method of pre-training, and its learning rate."""
    return recipe.model_copy(update={"pretrain": recipe.stage("pretrain").by_instead()})


def check_instead(recipe: Recipe) -> None:
    """Raise a UserError where the method that may take the place of `figure` cannot be built."""
    if recipe.stage("pretrain").instead == "none":
        return
    try:
        objective_for("pretrain", with_instead(recipe), "none", num_classes=2)
    except UserError as error:
        told = str(error).replace("pretrain.method", "pretrain.instead")
        raise UserError(f"{told} (Of pretrain.instead; with pretrain.instead=none it is not needed.)") from None


def time_for(folder: Run, data: Prepared, share: float = 1.0) -> float | None:
    """Return a stage's share of what is left of `run.time`, in seconds, after setting time aside for the end.

    Our choice: the reserve is 30 s and 0.1 s an image to evaluate, at most 30 % of what is left. The last stage, asked
    for when the others are done, gets all that is left then.
    """
    if folder.budget is None:
        return None
    left = max(folder.budget - folder.spent - folder.elapsed, 20.0)
    num_scored = len(data.of_split("test")) + len(data.of_split("val"))
    reserve = RESERVE_SECONDS + SECONDS_PER_CASE * num_scored
    if (folder.config.get("distill") or {}).get("epochs"):  # then teacher and student are both evaluated and exported
        reserve *= 2
    return share * (left - min(reserve, 0.3 * left))


def deliver(folder: Run, data: Prepared) -> None:
    """Evaluate and export, each only when its result is not there yet, and set student beside teacher."""
    distilled = (folder.folder / "distill" / "stage.json").exists()
    for stage in ["finetune", None] if distilled else [None]:
        score(folder, data, stage)
        export_once(folder, stage)
    if not data.of_split("test"):
        Progress("evaluate").close("there are too few masks for a test split; the validation figures are optimistic")
    own = folder.folder / "finetune" / "model.safetensors"
    if distilled and read_json(folder.folder / "distill" / "stage.json")["teacher_digests"] == digests_of([own]):
        found = compare_student(folder.folder)
        write_json(folder.folder / "distill" / "comparison.json", found)
        Progress("distill").close(lost_and_gained(found))


def score(folder: Run, data: Prepared, stage: str | None) -> None:
    """Evaluate the run's segmenter, or a stage's into the stage's folder, on validation and test."""
    path = (folder.folder / stage if stage else folder.folder) / "metrics.json"
    for split in ("val", "test"):
        cases = data.of_split(split)
        if cases and not (path.exists() and split in read_json(path)):
            evaluate_cases(folder.folder, cases, split, stage)
            folder.check_stop()


def export_once(folder: Run, stage: str | None) -> None:
    """Export the run's segmenter, or a stage's into the stage's folder, and measure its latency."""
    out = folder.folder / stage if stage else folder.folder
    if (out / "export.json").exists():
        return
    line = Progress("export" if stage is None else f"export {stage}")
    facts = export_run(folder.folder, out / "model.onnx", stage)
    facts["latency"] = measure_latency(out / "model.onnx", seconds=LATENCY_SECONDS)
    write_json(out / "export.json", facts)
    line.close(f"{facts['megabytes']:.1f} MB, agrees with torch to {facts['parity']['max_difference']:.1e}")


def report(out: Path) -> None:
    """Write the report of a run."""
    line = Progress("report")
    build_report([out], out / "report.html")
    line.close(str(out / "report.html"))

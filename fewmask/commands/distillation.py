"""The distill stage: a student learns from its teachers on every image it may see."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fewmask.commands.predictions import Answers
from fewmask.commands.prepare import Prepared
from fewmask.commands.select import SELECTION, chosen_folders
from fewmask.commands.stages import finish, fit_and_show, objective_for
from fewmask.config import DistillSection, Recipe
from fewmask.data.loader import Loader
from fewmask.data.streams import MixedLoader
from fewmask.deploy.run_files import find_segmenter
from fewmask.distill.distill import KD_ALONE, Distill
from fewmask.distill.kd import KD
from fewmask.engine.device import resolve_precision
from fewmask.engine.fit import Stream
from fewmask.engine.run import Run, is_main, read_json, seed_step, write_json
from fewmask.engine.stage import Stage
from fewmask.evaluate.results import Row, read_case_csv
from fewmask.evaluate.score import compare
from fewmask.evaluate.validation import Validation
from fewmask.models import Segmenter, load_model
from fewmask.registry import check_type
from fewmask.types import UserError

FROM_TEACHER = "teacher"
LOGIT_LOSSES = ("kd",)
TEACHER_STAGES = ("finetune", "distill")


def distill(run: Run, recipe: Recipe, data: Prepared, teachers: Sequence[Path], budget: float | None = None) -> Path:
    """Train the recipe's student from the teachers, chosen by validation Dice; return the path of its weights.

    `teachers` are model files or run folders. Images without a mask, but for those that a test image's patient or copy
    shows, take part unless `distill.unlabelled` is false. Raises UserError for a teacher that cannot be one.
    """
    section, stage = recipe.distill, Stage(run, "distill", budget, recipe.run.clock)
    assert section is not None
    path = stage.folder / "model.safetensors"
    if stage.done:
        return path
    unmasked(section, data)  # before anything is loaded or written
    files = [file for teacher in teachers for file in find_teachers(teacher)]
    if not files:
        raise UserError("There is no teacher to learn from; give one, for example distill.teachers='[\"RUN\"]'.")
    asks_once = predicts_once(section)
    digests = check_same_teachers(stage, files)
    seed_step(recipe.run.seed, 0, stream=4)
    models = [load_teacher(file) for file in files]
    start = best_of(files) if recipe.student.weights == FROM_TEACHER else None
    weights = recipe.student.weights if start is None else str(start)
    objective = objective_for("distill", recipe, weights, teachers=models)
    assert isinstance(objective, Distill)
    if asks_once and len(models) > 1:
        check_stored_answers(objective)
    levels, temperature = objective.stored_levels, objective.stored_at
    once = Answers(stage, recipe, data, models, digests, temperature, levels) if asks_once else None
    asked = stage.now()
    loader = stream(recipe, section, data, once)
    if stage.budget is not None:  # asking the teachers is part of the time that was given
        stage.budget = max(stage.budget - (stage.now() - asked), 0.5 * stage.budget)
    validate = Validation(data.dataset, data.validation, recipe.model.size, precision=resolve_precision(recipe.run))
    product, facts = fit_and_show(objective, loader, section, stage, recipe.run, validate)
    facts |= {"teachers": [str(file) for file in files], "num_validation": len(data.validation)}
    facts |= {
        "num_labelled": len(data.labelled),
        "weights": weights,
        "excluded": data.excluded,
        "teacher_digests": digests,
    }
    finish(stage, path, product, section, facts)
    return path


def predicts_once(section: DistillSection) -> bool:
    """Return whether the teachers are asked before the training; a UserError where that is asked for and for nothing.

    Unless told, they are where the losses read predictions alone: features take more room than images do.
    """
    losses = losses_of(section)
    listens = bool(losses) or (pseudo_weight_of(section) > 0 and section.unlabelled)
    if section.predict_once is True and not listens:
        raise UserError(
            "With distill.predict_once and no loss nothing would learn from the predictions: set "
            "distill.method.losses={kd={}}, or distill.method.pseudo_weight=1 and distill.unlabelled=true."
        )
    if section.predict_once == "auto":
        return listens and all(name in LOGIT_LOSSES for name in losses)
    return section.predict_once


def losses_of(section: DistillSection) -> Mapping[str, Any]:
    """Return the losses by name; a UserError where the setting holds anything else."""
    where = "distill.method.losses"
    found: Mapping[str, Any] = check_type(dict[str, Any], section.method.get("losses", KD_ALONE), where)
    return found


def pseudo_weight_of(section: DistillSection) -> float:
    """Return the weight of the teacher's decisions; a UserError where the setting is no number."""
    return float(check_type(float, section.method.get("pseudo_weight", 0.0), "distill.method.pseudo_weight"))


def check_stored_answers(objective: Distill) -> None:
    """Raise a UserError where one stored answer of several teachers is not what a loss is told to average over them.

    The mean of divergences is one from the mean softened answer, but for what no student changes; of another loss on
    logits that does not hold. Features are the first teacher's either way.
    """
    named = objective.distillers.items()
    others = [name for name, loss in named if not loss.pairs and not isinstance(loss, KD)]
    if objective.ensemble == "mean_kl" and others:
        raise UserError(
            f"With ensemble=mean_kl the loss '{others[0]}' is averaged over the teachers, and distill.predict_once "
            "stores one answer of all: set distill.predict_once=false, or distill.method.ensemble=average."
        )


def check_before_training(recipe: Recipe, stand_in: nn.Module) -> None:
    """Raise now what a chain's distillation would raise after hours of training its teacher.

    `stand_in` is a segmenter as the teacher will be.
    """
    section, student, model = recipe.distill, recipe.student, recipe.model
    assert section is not None
    predicts_once(section)
    for teacher in section.teachers:
        find_teachers(teacher)
    if student.weights == FROM_TEACHER and not section.teachers and student.encoder != model.encoder:
        raise UserError(
            f"The student starts from its teacher's encoder (student.weights=teacher), but its own is "
            f"'{student.encoder}' and the teacher's '{model.encoder}': set student.encoder={model.encoder}, or "
            "student.weights to packaged or none."
        )
    objective_for("distill", recipe, "none", teachers=[stand_in])


def best_of(files: Sequence[Path]) -> Path:
    """Return the teacher with the highest validation Dice by the stage.json beside it, or the first if one has none."""
    facts = [read_json(path) if (path := file.parent / "stage.json").is_file() else {} for file in files]
    scores = [found.get("best_score") for found in facts]
    return files[0] if None in scores else files[scores.index(max(scores))]


def digests_of(files: Sequence[Path]) -> list[str]:
    """Return 16 hex digits for the content of each file."""
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]


def check_same_teachers(stage: Stage, files: Sequence[Path]) -> list[str]:
    """Return the digests of the teachers' files; a UserError where a begun distillation had others."""
    digests = digests_of(files)
    path = stage.folder / "teachers.json"
    begun = any((stage.folder / "checkpoints").glob("step_*"))
    if begun and path.exists() and read_json(path) != digests:
        raise UserError(
            f"The teachers of {stage.folder} changed since its training began; put them back, or use another "
            "output folder."
        )
    if is_main():
        write_json(path, digests)
    return digests


def stream(recipe: Recipe, section: DistillSection, data: Prepared, once: Answers | None) -> Stream:
    """Return the batches of a distillation: labelled images alone, or beside those without a mask.

    `once`, where given, asks about all that its time allows, and the answers come with each batch.
    """
    others = unmasked(section, data)
    seed, least = recipe.run.seed, section.min_epoch_steps
    if once is not None:
        others = once.affordable(others)
    stored = once.of([*data.labelled, *others])._asdict() if once is not None else {}
    if not others:
        return Loader(data.dataset, data.labelled, section.batch_size, seed, least, **stored)
    num = min(max(round(section.labelled_share * section.batch_size), 1), section.batch_size - 1)
    if num < 1:
        raise UserError("distill.batch_size must be at least 2 to hold images with and without masks; raise it.")
    known = Loader(data.dataset, data.labelled, num, seed, least, **stored)
    unknown = Loader(data.dataset, others, section.batch_size - num, seed, least, **stored)
    return MixedLoader(known, unknown)


def unmasked(section: DistillSection, data: Prepared) -> list[int]:
    """Return the images without a mask to learn from.

    Raises a UserError where they would be all that a teacher is asked about, and there are none: else a student would
    learn from the masks alone without a word.
    """
    labelled = set(data.labelled)
    others = [i for i in data.body if i not in labelled] if section.unlabelled else []
    if not others and not losses_of(section) and pseudo_weight_of(section) > 0:
        raise UserError(
            "The student would learn nothing from its teacher: no loss compares them, and no image without a mask "
            "takes part on which it could learn the teacher's decision. Set distill.method.losses={kd={}}, or give "
            "data.unlabelled and distill.unlabelled=true."
        )
    return others


def find_teachers(path: Path) -> list[Path]:
    """Return the model files meant by a path: those a selection chose, or the one of a run folder or a file."""
    folders = chosen_folders(path) if (path / SELECTION).is_file() else [path]
    return [find_teacher(folder) for folder in folders]


def find_teacher(path: Path) -> Path:
    """Return the model file of a teacher: a file, or a run folder's fine-tuned segmenter, else the one it has."""
    if path.is_file():
        return path
    found = next((file for stage in TEACHER_STAGES if (file := path / stage / "model.safetensors").is_file()), None)
    if found is None:
        with contextlib.suppress(UserError):
            return find_segmenter(path)  # a pre-trained one, of `fewmask pretrain` alone
        raise UserError(
            f"The teacher {path} is no model file and no run folder with a finetune/model.safetensors; finish its "
            "fine-tuning first, or name another in distill.teachers."
        )
    return found


def load_teacher(path: Path) -> Segmenter:
    """Return a teacher's segmenter; a file that holds an encoder alone raises a UserError."""
    model, _ = load_model(path)
    if not isinstance(model, Segmenter):
        raise UserError(
            f"The teacher {path} is an encoder, which gives no masks; give a run that was fine-tuned, in "
            "distill.teachers."
        )
    return model


def compare_student(run: Path) -> dict[str, Any]:
    """Return what a run's student lost and gained against its teacher, ready for JSON.

    "student" and "teacher" hold parameters, megabytes, GMacs and the median milliseconds of a 256x256 photo on one
    thread; "splits", by split, the means of both and the paired difference of Dice, student minus teacher.
    """
    splits = {}
    for path in sorted(run.glob("cases_*.csv")):
        if (other := run / "finetune" / path.name).exists():
            ours, theirs = read_case_csv(path), read_case_csv(other)
            means = {name: {"dice": mean_of(rows, "dice"), "hd95_256": mean_of(rows, "hd95_256")}
                     for name, rows in (("student", ours), ("teacher", theirs))}  # fmt: skip
            splits[path.stem.removeprefix("cases_")] = {**means, **compare(ours, theirs)}
    return {"student": cost_of(run), "teacher": cost_of(run / "finetune"), "splits": splits}


def mean_of(rows: Sequence[Row], metric: str) -> float:
    """Return the mean of a metric over cases, those where it is not defined left out."""
    return float(np.nanmean([float(row[metric]) for row in rows]))


def cost_of(folder: Path) -> dict[str, Any]:
    """Return the size and speed that export.json tells."""
    facts = read_json(folder / "export.json")
    photos = [row for row in facts["latency"] if not row.get("network_only")]
    latency: dict[str, Any] = next((row for row in photos if row["threads"] == 1 and row["height"] == 256), {})
    return {
        "num_parameters": facts["num_parameters"],
        "megabytes": facts["megabytes"],
        "gmacs": facts.get("gmacs"),
        "ms": latency.get("p50_ms"),
    }


def lost_and_gained(found: Mapping[str, Any]) -> str:
    """Return the comparison in one line."""
    teacher, student = found["teacher"], found["student"]
    parts = [f"{teacher['megabytes']:.1f} -> {student['megabytes']:.1f} MB"]
    parts += [f"{teacher['num_parameters'] / 1e6:.2f} -> {student['num_parameters'] / 1e6:.2f} M parameters"]
    if teacher["ms"] and student["ms"]:
        parts += [f"{teacher['ms']:.1f} -> {student['ms']:.1f} ms a 256x256 photo on one thread"]
    for split in ("test", "val"):
        if split in found["splits"]:
            figures = found["splits"][split]
            between = "" if figures["low"] is None else f", 95 % {figures['low']:+.4f} to {figures['high']:+.4f}"
            dice = f"{figures['teacher']['dice']:.4f} -> {figures['student']['dice']:.4f}"
            return f"{split} Dice {dice} ({figures['difference']:+.4f}{between}); {', '.join(parts)}"
    return ", ".join(parts)

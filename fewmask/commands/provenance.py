"""What given models have learnt from, so that nothing is scored as if it had never been seen."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fewmask.config import Recipe
from fewmask.data.contents import content_hashes
from fewmask.engine.run import read_json
from fewmask.models.weights import WORDS
from fewmask.types import Case, UserError

PUBLIC_ID = re.compile(r"ISIC_\d{7}|IMD\d{3}")  # names that mean the same photo in every public set
MASKS = ("labelled", "validation")  # a model is chosen by what validates it
PICTURES = ("unlabelled",)


def public_id(image: Path) -> str | None:
    """Return the public identifier that a file's name begins with, as in ISIC_0000002_downsampled.jpg, or None."""
    match = PUBLIC_ID.match(image.stem)
    return match.group() if match else None


def given_models(recipe: Recipe) -> list[Path]:
    """Return the runs and model files that a recipe names, as weights to start from or as teachers."""
    named = [recipe.model.weights, recipe.student.weights]
    weights = [Path(word) for word in named if word not in WORDS]
    teachers = recipe.distill.teachers if recipe.distill else ()
    return [path for path in dict.fromkeys([*weights, *teachers]) if path.exists()]


class Before(NamedTuple):
    """What given models knew before: the content of images whose masks they learnt from, and a sentence for each model.

    `seen` are the names of the test images that one of them saw without their masks.
    """

    learnt: set[str]
    sentences: list[str]
    seen: set[str]


def learnt_before(models: Sequence[Path], tests: Sequence[Case]) -> Before:
    """Return what the models have learnt from, as far as they lie in their run folder.

    Raises a UserError where they have learnt from the mask of a test image, by content or by public identifier.
    """
    hashes = {value: case.name for case, value in zip(tests, _contents(tests), strict=True)}
    before = Before(set(), [], set())
    for model, name in zip(models, short_names(models), strict=True):
        run = run_of(model)
        if run is None:
            before.sentences.append(f"Model {name}: given, and what it has learnt from is not recorded beside it.")
            continue
        theirs, met = _met(run, MASKS, hashes, tests)
        if met:
            raise UserError(
                f"{model} has learnt from {len(met)} of the test images, such as {min(met)}; give a model that was "
                "trained with the same split."
            )
        before.learnt.update(theirs)
        _, seen = _met(run, PICTURES, hashes, tests)
        before.seen.update(seen)
        without = f", but it saw {len(seen)} of the test images without their masks" if seen else ""
        segments = any((run / stage).is_dir() for stage in ("finetune", "distill"))
        how = "and trained on" if segments or not (run / "pretrain").is_dir() else "pre-trained on images with"
        before.sentences.append(f"Model {name}: given, {how} {len(theirs)} masks, none of a test image{without}.")
    return before


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return each path's last part, or as many of its last parts for all as it takes to tell them apart."""
    apart = len(set(paths))
    deepest = max((len(path.parts) for path in paths), default=1)
    lengths = ([str(Path(*path.parts[-num:])) for path in paths] for num in range(1, deepest + 1))
    return next((names for names in lengths if len(set(names)) == apart), [str(path) for path in paths])


def run_of(model: Path) -> Path | None:
    """Return the run folder that a model lies in, None where there is none that tells what it has learnt from."""
    # A candidate of a selection lies two folders deeper than a run's own segmenter.
    places = [model, *model.parents[:4]] if model.is_file() else [model]
    return next((place for place in places if (place / "contents.json").is_file()), None)


def _met(run: Path, uses: Sequence[str], hashes: dict[str, str], tests: Sequence[Case]) -> tuple[set[str], set[str]]:
    """Return the content of all that a run used so, and the names of the test images among it."""
    theirs = {content for content, use in read_json(run / "contents.json").items() if use in uses}
    known = {identifier for identifier, use in used_ids(run).items() if use in uses}
    met = {hashes[content] for content in theirs & hashes.keys()}
    return theirs, met | {case.name for case in tests if public_id(case.image) in known}


def _contents(cases: Sequence[Case]) -> list[str]:
    hashes = content_hashes(cases)
    return [hashes[case.image] for case in cases]


def used_ids(run: Path) -> dict[str, str]:
    """Return {public identifier: use} of the images that a run's cases.csv says it has used; empty without the file."""
    path = run / "cases.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        found = {public_id(Path(row["image"])): row["use"] for row in csv.DictReader(file) if row["use"]}
    return {identifier: use for identifier, use in found.items() if identifier is not None}


def num_masks(run: Path) -> int | None:
    """Return how many masks a run was given to learn from, by its cases.csv; None without the file."""
    path = run / "cases.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return sum(row.get("use") == "labelled" for row in csv.DictReader(file))


def learnt_ids(models: Sequence[Path]) -> set[str]:
    """Return the public identifiers of the images whose masks the models' own runs have learnt from."""
    runs = [run for model in models if (run := run_of(model)) is not None]
    return {identifier for run in runs for identifier, use in used_ids(run).items() if use in MASKS}

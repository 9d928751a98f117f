"""How much of a table is measured: the settings `grid.NAME=...` of `fewmask reproduce`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewmask.config import parse_time
from fewmask.registry import build
from fewmask.types import UserError

LISTS = ("rows", "fractions", "teachers")
"""Settings of the grid that may be one or several: `grid.rows=mae` is a list of one."""


@dataclass(frozen=True)
class Grid:
    """How much of a table is measured: settings `grid.NAME=...`.

    `rows` and `fractions` (shares of the training masks) of the table, all of them where left out; `seeds` trainings
    of the segmenter for each, which draw their masks anew; `pretrain_seeds` pre-trainings a row, used in turn by the
    seeds; the time of one training, such as "20m", or "none" for all its epochs; `num_unseen` images of the unseen
    data set are scored, 0 for all. `student` is the recipe with [student] and [distill] that students are made by;
    `teachers` are run folders or model files that stand for every cell's own teacher, several as an ensemble; in their
    names "{fraction}" and "{seed}" are a cell's, for teachers of the same masks as its students. With
    `predict_once` each says once, before the training, what it sees (two-stage: always; see `DistillSection`).
    `train_time` is the time of each single network of a two-stage table, a pre-training and its fine-tuning together.
    With `folds`, for data without splits, a seed's test images are the patients of one fold, so that `seeds` is their
    number. Raises UserError for values that cannot be.
    """

    rows: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    seeds: int = 3
    pretrain_seeds: int = 1
    pretrain_time: str = "none"
    finetune_time: str = "none"
    train_time: str = "none"
    distill_time: str = "none"
    folds: int = 0
    num_unseen: int = 0
    student: str = "tiny_unet"
    teachers: tuple[Path, ...] = ()
    predict_once: bool = False

    def __post_init__(self) -> None:
        """Check what types do not say."""
        for name in ("pretrain_time", "finetune_time", "train_time", "distill_time"):
            try:
                parse_time(getattr(self, name))
            except ValueError as error:
                raise UserError(f"Setting 'grid.{name}' cannot be {getattr(self, name)!r}: {error}.") from None
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(f"Setting 'grid.fractions' cannot be {list(self.fractions)}: give shares from 0 to 1.")
        if not 1 <= self.pretrain_seeds <= self.seeds or self.num_unseen < 0:
            raise UserError(
                "grid.seeds must be at least grid.pretrain_seeds, that at least 1, grid.num_unseen at least 0."
            )
        if self.folds and (self.folds < 2 or self.seeds != self.folds):
            raise UserError(
                f"grid.folds is {self.folds} and grid.seeds {self.seeds}: give at least two folds and leave grid.seeds "
                "out, as each fold has a seed of its own."
            )


def grid_of(defaults: Mapping[str, Any], settings: Iterable[str]) -> Grid:
    """Return the grid that settings of the form `grid.NAME=VALUE` ask for, `defaults` where they do not say."""
    return build(Grid, _with_folds(defaults, _grid_settings(settings)), "grid")


def _with_folds(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grid's settings, with as many seeds as folds where nobody says how many."""
    folds = settings.get("folds") or 0
    return {**values, **({"seeds": folds} if isinstance(folds, int) and folds > 0 else {}), **settings}


def _grid_settings(settings: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in settings:
        key, sign, raw = text.partition("=")
        if key.startswith("grid.") and sign:
            try:
                value = tomllib.loads(f"value = {raw}")["value"]
            except tomllib.TOMLDecodeError:
                value = raw
            name = key.removeprefix("grid.")
            values[name] = [value] if name in LISTS and not isinstance(value, list) else value
    return values

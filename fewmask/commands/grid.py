"""The grid behind a paper's table: which jobs it takes, with which recipes, in which folders."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewmask.commands.jobs import Job
from fewmask.commands.tables import TABLES, Pretrained, Row, Student, Table, Teacher
from fewmask.config import Recipe, load_recipe, parse_time
from fewmask.registry import build, choose
from fewmask.types import UserError

TEACHER = "teacher"  # the row whose segmenters the students of the same cell learn from
SET_BY_GRID = {
    "run.time": "grid.pretrain_time, grid.finetune_time and grid.distill_time",
    "run.seed": "grid.seeds and grid.pretrain_seeds",
    "run.out": "--out",
    "data.root": "--data",
    "data.manifest": "--manifest",
    "data.unlabelled": "--unlabelled",
    "data.label_fraction": "grid.fractions",
    "distill.teachers": "grid.teachers",
    "distill.unlabelled": "grid.rows",
    "distill.predict_once": "grid.rows",
    "distill.method.losses": "grid.rows",
    "distill.method.pseudo_weight": "grid.rows",
}
# Of `Grid`, what only one kind of table has a use for.
ONLY_IF_PRETRAINED = ("grid.pretrain_seeds", "grid.pretrain_time")
ONLY_IF_DISTILLED = ("grid.distill_time", "grid.student", "grid.teachers")
STAGE_OF = {"pretrain": "pretrain", "finetune": "finetune", "distill": "distill", "student": "distill"}


@dataclass(frozen=True)
class Grid:
    """How much of a table is measured: settings `grid.NAME=...`.

    `rows` and `fractions` (shares of the training masks) of the table, all of them where left out; `seeds` trainings
    of the segmenter for each, which draw their masks anew; `pretrain_seeds` pre-trainings a row, used in turn by the
    seeds; the time of one training, such as "20m", or "none" for all its epochs; `num_unseen` images of the unseen
    data set are scored, 0 for all. `student` is the recipe with [student] and [distill] that students are made by;
    `teachers` are run folders or model files that stand for every cell's own teacher, several as an ensemble. Raises
    UserError for values that cannot be.
    """

    rows: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    seeds: int = 3
    pretrain_seeds: int = 1
    pretrain_time: str = "none"
    finetune_time: str = "none"
    distill_time: str = "none"
    num_unseen: int = 0
    student: str = "tiny_unet"
    teachers: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Check what types do not say."""
        for name in ("pretrain_time", "finetune_time", "distill_time"):
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


@dataclass(frozen=True)
class Order:
    """What was asked for: a table, where its data are and where its runs go, and all settings."""

    table: str
    budget: str
    grid: Grid
    out: Path
    data: Path
    manifest: str | None
    unlabelled: tuple[Path, ...]
    settings: tuple[str, ...]

    @property
    def what(self) -> Table:
        """The table's description."""
        return TABLES[self.table]

    @property
    def rows(self) -> dict[str, Row]:
        """The rows that are measured, in the table's order."""
        table = self.what.rows
        chosen = {name: choose(table, name, f"row in {self.table}") for name in self.grid.rows} or table
        return {name: row for name, row in table.items() if name in chosen}

    @property
    def fractions(self) -> tuple[float, ...]:
        """The label fractions that are measured."""
        return self.grid.fractions or self.what.fractions

    def pretraining(self, row: str, seed: int) -> Path:
        """Return the folder of the pre-training that a seed of a row starts from."""
        return self.out / f"{row}-{seed % self.grid.pretrain_seeds}"

    def folder(self, row: str, fraction: float, seed: int) -> Path:
        """Return the folder of the job that a cell is scored by."""
        if isinstance(self.what.rows.get(row), Teacher) and self.grid.teachers:
            return self.out / row / "given"  # the same for every share of the masks and every seed
        return self.out / row / f"{fraction:g}-{seed}"

    def jobs(self, row: str, fraction: float, seed: int) -> tuple[Job, ...]:
        """Return what a cell takes, in order; the last job is the one whose scores stand in the table.

        A job may serve several cells. A new kind of row has its jobs told here.
        """
        what, folder = self.what.rows[row], self.folder(row, fraction, seed)
        if isinstance(what, Student):
            teachers = self.grid.teachers or (self.folder(TEACHER, fraction, seed),)
            student = Job(folder, "distill", self.student_recipe(row, fraction, seed), teachers=teachers)
            return (student,) if self.grid.teachers else (*self.jobs(TEACHER, fraction, seed), student)
        if isinstance(what, Teacher):
            if self.grid.teachers:
                return (Job(folder, "ensemble", self.finetune_recipe(1.0, 0), teachers=self.grid.teachers),)
            return (Job(folder, "finetune", self.finetune_recipe(fraction, seed)),)
        pretraining = self.pretrain_recipe(row, seed)
        if pretraining is None:
            return (Job(folder, "finetune", self.finetune_recipe(fraction, seed)),)
        first = Job(self.pretraining(row, seed), "pretrain", pretraining)
        return first, Job(folder, "finetune", self.finetune_recipe(fraction, seed), weights=first.model)

    def pretrain_recipe(self, row: str, seed: int) -> Recipe | None:
        """Return the recipe of a row's pre-training, None for a row without one."""
        what = self.what.rows[row]
        if not isinstance(what, Pretrained) or what.recipe is None:
            return None
        method = {f"pretrain.method.{key}": value for key, value in what.method.items()}
        given: dict[str, Any] = {"run.time": self.grid.pretrain_time, **method, **self._all_images}
        return self._recipe("pretrain", what.recipe, seed % self.grid.pretrain_seeds, given)

    def finetune_recipe(self, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a fine-tuning; it is the same for every row.

        A teacher's data are its students', so that none of them trains on what another chooses its weights by.
        """
        images = self._all_images if self.what.distils else {}
        given = {"run.time": self.grid.finetune_time, "data.label_fraction": fraction, **images}
        return self._recipe("finetune", self.what.finetune, seed, given)

    def student_recipe(self, row: str, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a student's distillation."""
        what = self.what.rows[row]
        assert isinstance(what, Student)
        given = {
            "run.time": self.grid.distill_time,
            "data.label_fraction": fraction,
            "distill.unlabelled": what.unlabelled,
            "distill.predict_once": False,  # impossible for rows with losses, and all rows are to be alike
            "distill.method.losses": dict(what.losses),
            "distill.method.pseudo_weight": what.pseudo_weight,
        }
        return self._recipe("distill", self.grid.student, seed, given | self._all_images)

    @property
    def _all_images(self) -> dict[str, Any]:
        return {"data.unlabelled": [str(path) for path in self.unlabelled]}

    def _recipe(self, stage: str, name: str, seed: int, given: Mapping[str, Any]) -> Recipe:
        of_budget = {key: value for key, value in self.what.budgets[self.budget].items() if _concerns(key, stage)}
        ours = {"data.root": str(self.data), "data.manifest": self.manifest, "run.seed": seed}
        settings = [text for text in self.settings if _concerns(text, stage)]
        # A copy: settings are written into what is given, and the tables are every order's.
        return load_recipe(name, settings, given=copy.deepcopy({**of_budget, **ours, **given}))


def _concerns(key: str, stage: str) -> bool:
    section = key.split(".")[0]
    return section != "grid" and STAGE_OF.get(section, stage) == stage


def place_order(
    table: str,
    budget: str,
    out: Path,
    data: Path,
    manifest: str | None,
    unlabelled: Iterable[Path],
    settings: Sequence[str],
) -> Order:
    """Return the order with its settings checked; all recipes are resolved, so that a wrong one is told at once."""
    what = choose(TABLES, table, "table")
    defaults = choose(what.budgets, budget, "budget")
    for text in settings:
        _check_use(table, what, text.partition("=")[0])
    values = {key.removeprefix("grid."): value for key, value in defaults.items() if key.startswith("grid.")}
    grid = build(Grid, values | _grid_settings(settings), "grid")
    if what.distils:
        load_recipe(grid.student).stage("distill")  # before settings are written into a section it may not have
    order = Order(table, budget, grid, out, data, manifest, tuple(unlabelled), tuple(settings))
    for row in order.rows:
        for fraction in order.fractions:
            order.jobs(row, fraction, 0)
    return order


def _check_use(table: str, what: Table, key: str) -> None:
    """Raise a UserError for a setting that the grid gives a value, or that this kind of table has no use for."""
    for name, instead in SET_BY_GRID.items():
        if key == name or key.startswith(f"{name}."):
            raise UserError(f"'{key}' differs from run to run of a table; use {instead} instead.")
    useless = ONLY_IF_PRETRAINED if what.distils else ONLY_IF_DISTILLED
    if key in useless or STAGE_OF.get(key.split(".")[0], what.stages[0]) not in what.stages:
        raise UserError(
            f"'{key}' is of no use to {table}, which goes through {' and '.join(what.stages)}; leave it out."
        )


def _grid_settings(settings: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in settings:
        key, sign, raw = text.partition("=")
        if key.startswith("grid.") and sign:
            try:
                value = tomllib.loads(f"value = {raw}")["value"]
            except tomllib.TOMLDecodeError:
                value = raw
            values[key.removeprefix("grid.")] = value
    return values


Cell = tuple[str, float, int]


def cells(order: Order, left_out: Iterable[str] = ()) -> Iterator[Cell]:
    """Yield (row, fraction, seed) of every cell, a whole table with one seed before the next seed begins.

    `left_out` holds what is not run: whole rows, and cells by their `cell_names`.
    """
    kept = set(left_out)
    for seed in range(order.grid.seeds):
        for fraction in order.fractions:
            for row in order.rows:
                if not kept.intersection((row, *cell_names(row, fraction, seed))):
                    yield row, fraction, seed


def cell_names(row: str, fraction: float, seed: int) -> tuple[str, str]:
    """Return what a row at a share of the masks is called, and what its training with one seed is."""
    share = f"{row}, {100 * fraction:g} % of the masks"
    return share, f"{share}, seed {seed}"

"""The grid behind a paper's table: which jobs it takes, with which recipes, in which folders."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from fewmask.auxiliary import AUXILIARY
from fewmask.commands.grid_settings import Grid, grid_of
from fewmask.commands.jobs import Job
from fewmask.commands.select import candidates, check_shares
from fewmask.commands.stages import with_precision
from fewmask.commands.tables import TABLES, Ensemble, MultiTask, Pretrained, Row, Single, Student, Table, Teacher
from fewmask.config import Recipe, SelectSection, load_recipe, recipes_with
from fewmask.registry import choose
from fewmask.types import UserError

TEACHER = "teacher"  # the row whose segmenters the students of the same cell learn from
PLAIN = "plain"  # the row of a segmenter without any task; its network is the first of a cell's several seeds
EQUAL_WEIGHT = 1.0  # of each task in a row of several tasks, as that of the segmentation
SEED_STEP = 1000  # between the seeds of one cell's plain networks, so that no two cells share one
SET_BY_GRID = {
    "run.time": "grid.pretrain_time, grid.finetune_time, grid.train_time and grid.distill_time",
    "run.seed": "grid.seeds and grid.pretrain_seeds",
    "run.out": "--out",
    "data.root": "--data",
    "data.manifest": "--manifest",
    "data.unlabelled": "--unlabelled",
    "data.label_fraction": "grid.fractions",
    "data.label_seed": "grid.seeds",
    "data.num_folds": "grid.folds",
    "data.fold": "grid.folds",
    "distill.teachers": "grid.teachers",
    "distill.unlabelled": "grid.rows",
    "distill.predict_once": "grid.predict_once",
    "distill.method.losses": "grid.rows",
    "distill.method.pseudo_weight": "grid.rows",
}
SET_BY_ROWS = {
    "finetune.method.name": "grid.rows",
    "finetune.method.task": "grid.rows",
    "finetune.method.task_weight": "grid.rows and select.weights",
    "finetune.method.task_settings": "select.task_settings",
    "finetune.method.combine": "grid.rows",
    "pretrain.method": "select.task_settings",
    "distill.method.ensemble": "grid.rows",
}
"""What the rows of a two-stage table differ by, beside the settings above."""

# Of `Grid`, what only some kinds of table have a use for.
USED_BY = {
    "grid.pretrain_seeds": ("pretrained",),
    "grid.pretrain_time": ("pretrained",),
    "grid.finetune_time": ("pretrained", "distilled"),
    "grid.train_time": ("two-stage",),
    "grid.folds": ("two-stage",),
    "grid.distill_time": ("distilled", "two-stage"),
    "grid.student": ("distilled", "two-stage"),
    "grid.teachers": ("distilled",),
    "grid.predict_once": ("distilled",),
}
SECTIONS = {
    "pretrain": ("pretrain",),
    "finetune": ("finetune",),
    "distill": ("distill", "student"),
    "select": ("select", "pretrain", "finetune"),
}
"""The sections of a recipe that say how a stage trains; all others concern every stage."""
OF_A_STAGE = frozenset(section for sections in SECTIONS.values() for section in sections)


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
        return {name: row for name, row in table.items() if name in chosen and self._is_tried(row)}

    @cached_property
    def selects(self) -> SelectSection:
        """What a two-stage table selects from."""
        return self.select_recipe(self.fractions[0], 0).select or SelectSection()

    @property
    def joint_tasks(self) -> list[str]:
        """The tasks that need no masks, which are trained jointly in the rows of several tasks."""
        return [task for task in self.selects.tasks if not choose(AUXILIARY, task, "auxiliary task").needs_masks]

    def _is_tried(self, row: Row) -> bool:
        """Whether the selection has the candidate that a row is of; true of every other row."""
        if not isinstance(row, Single) or not row.task:
            return True
        return row.task in self.selects.tasks and row.mode in self.selects.modes

    @property
    def fractions(self) -> tuple[float, ...]:
        """The label fractions that are measured."""
        return self.grid.fractions or self.what.fractions

    def pretraining(self, row: str, seed: int) -> Path:
        """Return the folder of the pre-training that a seed of a row starts from."""
        return self.out / f"{row}-{seed % self.grid.pretrain_seeds}"

    def pretraining_name(self, row: str, seed: int) -> str:
        """Return what the pre-training that a seed of a row starts from is called: the row, where it has but one."""
        num = self.grid.pretrain_seeds
        return row if num == 1 else f"{row}, pre-training {seed % num}"

    def folder(self, row: str, fraction: float, seed: int) -> Path:
        """Return the folder of the job that a cell is scored by."""
        given = isinstance(self.what.rows.get(row), Teacher) and self.grid.teachers
        if given and not self.teachers_differ:
            return self.out / row / "given"  # the same for every share of the masks and every seed
        return self.out / row / f"{fraction:g}-{seed}"

    def teachers(self, fraction: float, seed: int) -> tuple[Path, ...]:
        """Return the given teachers of a cell."""
        named = (str(path).replace("{fraction}", f"{fraction:g}") for path in self.grid.teachers)
        return tuple(Path(name.replace("{seed}", str(seed))) for name in named)

    @property
    def teachers_differ(self) -> bool:
        """Whether each cell has given teachers of its own."""
        return self.teachers(self.fractions[0], 0) != self.grid.teachers

    @property
    def all_teachers(self) -> tuple[Path, ...]:
        """The given teachers of all cells, each once."""
        everywhere = product(range(self.grid.seeds), self.fractions)
        return tuple(dict.fromkeys(path for seed, fraction in everywhere for path in self.teachers(fraction, seed)))

    def selection(self, fraction: float, seed: int) -> Path:
        """Return the folder of a cell's selection among auxiliary tasks."""
        return self.out / "selection" / f"{fraction:g}-{seed}"

    def jobs(self, row: str, fraction: float, seed: int) -> tuple[Job, ...]:
        """Return what a cell takes, in order; the last job is the one whose scores stand in the table.

        A job may serve several cells. A new kind of row has its jobs told here.
        """
        what, folder, cell = self.what.rows[row], self.folder(row, fraction, seed), (fraction, seed)
        if isinstance(what, Student):
            first, teachers = self._taught_by(what.learns_from, *cell)
            return *first, Job(folder, "distill", self.student_recipe(row, *cell), teachers=teachers)
        if isinstance(what, Ensemble):
            first, members = self._taught_by(what.of, *cell)
            return *first, Job(folder, "ensemble", self.finetune_recipe(*cell), teachers=members)
        if isinstance(what, Single):
            first, selected = self._taught_by("selection", *cell)
            recipe = self.select_recipe(*cell)
            return *first, Job(folder, "ensemble", recipe, teachers=selected, candidate=(what.task, what.mode))
        if isinstance(what, MultiTask):
            return (Job(folder, "finetune", self.joint_recipe(what, *cell)),)
        if isinstance(what, Teacher) and self.grid.teachers:
            return (Job(folder, "ensemble", self.finetune_recipe(1.0, 0), teachers=self.teachers(*cell)),)
        pretraining = self.pretrain_recipe(row, seed)
        if pretraining is None:
            return (Job(folder, "finetune", self.finetune_recipe(*cell)),)
        earlier = Job(self.pretraining(row, seed), "pretrain", pretraining)
        return earlier, Job(folder, "finetune", self.finetune_recipe(*cell), weights=earlier.model)

    def _taught_by(self, source: str, fraction: float, seed: int) -> tuple[tuple[Job, ...], tuple[Path, ...]]:
        """Return the jobs that make the teachers or members of a source in a cell, and where these will be."""
        if source == "selection":
            selected = self.selection(fraction, seed)
            return (Job(selected, "select", self.select_recipe(fraction, seed)),), (selected,)
        if source == "plain":
            return self.jobs(PLAIN, fraction, seed), (self.folder(PLAIN, fraction, seed),)
        if source == "seeds":
            networks = self.plain_networks(fraction, seed)
            return networks, tuple(job.folder for job in networks)
        if self.grid.teachers:
            return (), self.teachers(fraction, seed)
        return self.jobs(TEACHER, fraction, seed), (self.folder(TEACHER, fraction, seed),)

    def seeds_folder(self, fraction: float, seed: int) -> Path:
        """Return the folder of a cell's plain networks but the first."""
        return self.out / "seeds" / f"{fraction:g}-{seed}"

    def plain_networks(self, fraction: float, seed: int) -> tuple[Job, ...]:
        """Return the trainings of as many plain networks as there are tasks, each of its own seed, on the same masks.

        The first is that of the row without any task.
        """
        folder = self.seeds_folder(fraction, seed)
        recipes = [self.finetune_recipe(fraction, seed, number) for number in range(1, len(self.selects.tasks))]
        others = (Job(folder / str(recipe.run.seed), "finetune", recipe, scored=False) for recipe in recipes)
        return *self.jobs(PLAIN, fraction, seed), *others

    def pretrain_recipe(self, row: str, seed: int) -> Recipe | None:
        """Return the recipe of a row's pre-training, None for a row without one."""
        what = self.what.rows[row]
        if not isinstance(what, Pretrained) or what.recipe is None:
            return None
        method = {f"pretrain.method.{key}": value for key, value in what.method.items()}
        given: dict[str, Any] = {"run.time": self.grid.pretrain_time, **method, **what.network, **self._all_images}
        return self._recipe("pretrain", what.recipe, seed % self.grid.pretrain_seeds, given)

    def finetune_recipe(self, fraction: float, seed: int, number: int = 0) -> Recipe:
        """Return the recipe of a fine-tuning; it is the same for every row.

        A teacher's data are its students', so that none of them trains on what another chooses its weights by. `number`
        counts the plain networks of a cell: each has a seed of its own, and all have the masks of the first.
        """
        images = self._all_images if self.what.distils else {}
        time = self.grid.train_time if self.what.selects else self.grid.finetune_time
        again = {"run.seed": seed + number * SEED_STEP, "data.label_seed": seed} if number else {}
        given = {"run.time": time, "data.label_fraction": fraction, **images, **again}
        return self._recipe("finetune", self.what.finetune, seed, given)

    def joint_recipe(self, row: MultiTask, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a fine-tuning with several tasks; a UserError where all of them need masks."""
        if not self.joint_tasks:
            raise UserError(
                f"select.tasks is {', '.join(self.selects.tasks)}, and rows of several tasks take those that need no "
                "masks: add one, or leave these rows out of grid.rows."
            )
        settings = {task: self.selects.task_settings.get(task, {}) for task in self.joint_tasks}
        method = {"name": "joint", "task": self.joint_tasks, "task_settings": settings, "combine": row.combine}
        given = {f"finetune.method.{key}": value for key, value in {**method, "task_weight": EQUAL_WEIGHT}.items()}
        given |= {"run.time": self.grid.train_time, "data.label_fraction": fraction, **self._all_images}
        return self._recipe("finetune", self.what.finetune, seed, given)

    def select_recipe(self, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a cell's selection; its time is that of each candidate."""
        given = {"run.time": self.grid.train_time, "data.label_fraction": fraction, **self._all_images}
        return self._recipe("select", self.what.finetune, seed, given)

    def student_recipe(self, row: str, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a student's distillation."""
        what = self.what.rows[row]
        assert isinstance(what, Student)
        given = {
            "run.time": self.grid.distill_time,
            "data.label_fraction": fraction,
            "distill.unlabelled": what.unlabelled,
            # All rows alike, but for those that ask nothing.
            "distill.predict_once": (self.what.selects or self.grid.predict_once)
            and bool(what.losses or what.pseudo_weight),
            "distill.method.losses": dict(what.losses),
            "distill.method.pseudo_weight": what.pseudo_weight,
            **({"distill.method.ensemble": what.ensemble} if what.ensemble else {}),
        }
        return self._recipe("distill", self.grid.student, seed, given | self._all_images)

    @property
    def _all_images(self) -> dict[str, Any]:
        return {"data.unlabelled": [str(path) for path in self.unlabelled]}

    def _recipe(self, stage: str, name: str, seed: int, given: Mapping[str, Any]) -> Recipe:
        of_budget = {key: value for key, value in self.what.budgets[self.budget].items() if _concerns(key, stage)}
        ours = {"data.root": str(self.data), "data.manifest": self.manifest, "run.seed": seed}
        if self.grid.folds:
            ours |= {"data.num_folds": self.grid.folds, "data.fold": seed}
        settings = [text for text in self.settings if _concerns(text, stage)]
        # A copy: settings are written into what is given, and the tables are every order's.
        return with_precision(load_recipe(name, settings, given=copy.deepcopy({**of_budget, **ours, **given})))


def _concerns(key: str, stage: str) -> bool:
    section = key.split(".")[0]
    return section != "grid" and (section not in OF_A_STAGE or section in SECTIONS[stage])


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
    grid = grid_of(values, settings)
    if what.distils:
        student = load_recipe(grid.student)  # before settings are written into a section it may not have
        if student.distill is None:
            raise UserError(
                f"grid.student={grid.student} has no [distill] section; choose one that has: "
                f"{', '.join(recipes_with('distill'))}."
            )
    order = Order(table, budget, grid, out, data, manifest, tuple(unlabelled), tuple(settings))
    if what.selects:
        wanted = list(candidates(order.selects))  # a wrong task is told at once
        check_shares(order.select_recipe(order.fractions[0], 0), wanted)
    for name in grid.rows:
        if choose(what.rows, name, f"row in {table}") and name not in order.rows:
            raise UserError(f"grid.rows holds '{name}', which select.tasks or select.modes leaves out; add it there.")
    for row in order.rows:
        for fraction in order.fractions:
            order.jobs(row, fraction, 0)
    return order


def _check_use(table: str, what: Table, key: str) -> None:
    """Raise a UserError for a setting that the grid gives a value, or that this kind of table has no use for."""
    by_rows = SET_BY_ROWS if what.selects else {"pretrain.method.name": "grid.rows"}
    for name, instead in {**SET_BY_GRID, **by_rows}.items():
        if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}."):
            raise UserError(f"'{key}' differs from run to run of a table; use {instead} instead.")
    of_stages = {name for stage in what.stages for name in SECTIONS[stage]}
    section = key.split(".")[0]
    if what.kind not in USED_BY.get(key, (what.kind,)) or (section in OF_A_STAGE and section not in of_stages):
        raise UserError(
            f"'{key}' is of no use to {table}, which goes through {' and '.join(what.stages)}; leave it out."
        )


Cell = tuple[str, float, int]


def cells(order: Order, left_out: Iterable[str] = ()) -> Iterator[Cell]:
    """Yield (row, fraction, seed) of every cell, a whole table with one seed before the next seed begins.

    `left_out` holds what is not run: whole rows, cells by their `cell_names` or their `Order.pretraining_name`.
    """
    kept = set(left_out)
    for seed in range(order.grid.seeds):
        for fraction in order.fractions:
            for row in order.rows:
                names = (row, order.pretraining_name(row, seed), *cell_names(row, fraction, seed))
                if not kept.intersection(names):
                    yield row, fraction, seed


def cell_names(row: str, fraction: float, seed: int) -> tuple[str, str]:
    """Return what a row at a share of the masks is called, and what its training with one seed is."""
    share = f"{row}, {100 * fraction:g} % of the masks"
    return share, f"{share}, seed {seed}"

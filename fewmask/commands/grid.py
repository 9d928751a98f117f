"""The grid behind a paper's table: which runs it takes, with which recipes, in which folders."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewmask.commands.evaluate import evaluate_cases
from fewmask.commands.papers import LABEL_FRACTIONS
from fewmask.commands.prepare import prepare
from fewmask.commands.stages import configure_torch, finetune, pretrain
from fewmask.config import Recipe, load_recipe, parse_time
from fewmask.engine.run import Run, interruptible, is_main
from fewmask.evaluate.results import read_metrics
from fewmask.registry import build, choose
from fewmask.types import Case, UserError

FINETUNE_RECIPE = "transunet"


class NotTrainedError(UserError):
    """A pre-training stopped for a reason of its own (a collapse, a loss that is not finite): a result, not an end."""


@dataclass(frozen=True)
class Row:
    """A line of a table: the recipe its encoder is pre-trained by, None for not at all, and settings of its method."""

    recipe: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)


def _masked(mask: str) -> Row:
    return Row("mae", {"mask": mask, "mask_ratio": 0.25})


TABLES: dict[str, dict[str, Row]] = {
    "g2ll-table1": {
        "random": Row(), **{name: Row(name) for name in ("supervised", "mae", "dino", "g2ll", "tedmae")}
    },
    "g2ll-table2": {
        "random": Row(),
        "mask-random": _masked("random"),
        "mask-semantic": _masked("semantic"),
        "mask-semantic-focal": _masked("semantic_focal"),
    },
    "tedmae": {
        "random": Row(),
        "mae": Row("tedmae", {"teacher": False}),
        "teacher": Row("tedmae", {"ec": False, "df": False}),
        "ec": Row("tedmae", {"df": False}),
        "all": Row("tedmae"),
    },
}
"""The rows of each table; "random", an encoder without pre-training, stands in all of them for comparison."""

REFERENCES = {"g2ll-table1": ("mae", "random"), "g2ll-table2": ("mask-random", "random"), "tedmae": ("mae", "random")}
"""The rows that every other row is compared with, image by image."""

# G2LL's fine-tuning. Our choice: a rate that falls from block to block would hold back an encoder without pre-training.
_FINETUNE = {
    "finetune.optimiser": "adam", "finetune.lr": 3e-4, "finetune.weight_decay": 0.0, "finetune.layer_decay": 1.0,
    "finetune.epochs": 100, "finetune.batch_size": 16,
}  # fmt: skip
BUDGETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_FINETUNE, "grid.seeds": 2, "model.encoder": "vit_tiny_patch16", "model.size": 64,
        "model.segmenter_settings": {"decoder_channels": [32, 16, 16, 8]},
        "pretrain.epochs": 1, "pretrain.batch_size": 4, "pretrain.min_epoch_steps": 2,
        "finetune.epochs": 1, "finetune.batch_size": 4, "finetune.min_epoch_steps": 12, "finetune.lr": 3e-3,
        "finetune.method.average": 0.0,
    },
    "cpu": {
        **_FINETUNE, "grid.pretrain_time": "20m", "grid.finetune_time": "4m", "grid.num_unseen": 500,
        "model.encoder": "vit_tiny_patch8", "model.size": 128,
    },
    "full": {
        **_FINETUNE, "finetune.min_epoch_steps": 1, "finetune.method.average": 0.0,
        "model.encoder": "vit_small_patch16", "model.size": 256,
        "pretrain.optimiser": "adamw", "pretrain.lr": 1.5e-4, "pretrain.batch_size": 128,
        "pretrain.epochs": 300, "pretrain.warmup": 40 / 300,
    },
}  # fmt: skip
"""Settings by budget: seconds on drawn images; hours on two cores, the same time for every method; the paper's."""

SET_BY_GRID = {
    "run.time": "grid.pretrain_time and grid.finetune_time",
    "run.seed": "grid.seeds and grid.pretrain_seeds",
    "run.out": "--out",
    "data.root": "--data",
    "data.manifest": "--manifest",
    "data.unlabelled": "--unlabelled",
    "data.label_fraction": "grid.fractions",
}


@dataclass(frozen=True)
class Grid:
    """How much of a table is measured: settings `grid.NAME=...`.

    `rows` and `fractions` (shares of the training masks) of the table, all of them where left out; `seeds` trainings
    of the segmenter for each, which draw their masks anew; `pretrain_seeds` pre-trainings a row, used in turn by the
    seeds; the time of one training, such as "20m", or "none" for all its epochs; `num_unseen` images of the unseen
    data set are scored, 0 for all. Raises UserError for values that cannot be.
    """

    rows: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    seeds: int = 3
    pretrain_seeds: int = 1
    pretrain_time: str = "none"
    finetune_time: str = "none"
    num_unseen: int = 0

    def __post_init__(self) -> None:
        """Check what types do not say."""
        for name in ("pretrain_time", "finetune_time"):
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
    def rows(self) -> dict[str, Row]:
        """The rows that are measured, in the table's order."""
        table = TABLES[self.table]
        chosen = {name: choose(table, name, f"row in {self.table}") for name in self.grid.rows} or table
        return {name: row for name, row in table.items() if name in chosen}

    @property
    def fractions(self) -> tuple[float, ...]:
        """The label fractions that are measured."""
        return self.grid.fractions or (LABEL_FRACTIONS if self.table == "g2ll-table1" else (1.0,))

    def pretraining(self, row: str, seed: int) -> Path:
        """Return the folder of the pre-training that a seed of a row starts from."""
        return self.out / f"{row}-{seed % self.grid.pretrain_seeds}"

    def finetuning(self, row: str, fraction: float, seed: int) -> Path:
        """Return the folder of a cell's training with a seed."""
        return self.out / row / f"{fraction:g}-{seed}"

    def pretrain_recipe(self, row: str, seed: int) -> Recipe | None:
        """Return the recipe of a row's pre-training, None for a row without one."""
        name = self.rows[row].recipe
        if name is None:
            return None
        method = {f"pretrain.method.{key}": value for key, value in self.rows[row].method.items()}
        given: dict[str, Any] = {"run.time": self.grid.pretrain_time, **method}
        given["data.unlabelled"] = [str(path) for path in self.unlabelled]
        return self._recipe("pretrain", name, seed % self.grid.pretrain_seeds, given)

    def finetune_recipe(self, fraction: float, seed: int) -> Recipe:
        """Return the recipe of a fine-tuning; it is the same for every row."""
        given = {"run.time": self.grid.finetune_time, "data.label_fraction": fraction}
        return self._recipe("finetune", FINETUNE_RECIPE, seed, given)

    def _recipe(self, stage: str, name: str, seed: int, given: Mapping[str, Any]) -> Recipe:
        of_budget = {key: value for key, value in BUDGETS[self.budget].items() if _concerns(key, stage)}
        ours = {"data.root": str(self.data), "data.manifest": self.manifest, "run.seed": seed}
        settings = [text for text in self.settings if _concerns(text, stage)]
        return load_recipe(name, settings, given={**of_budget, **ours, **given})


def _concerns(key: str, stage: str) -> bool:
    return not key.startswith("grid.") and key.split(".")[0] not in {"pretrain", "finetune"} - {stage}


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
    choose(TABLES, table, "table")
    defaults = choose(BUDGETS, budget, "budget")
    for text in settings:
        if (key := text.partition("=")[0]) in SET_BY_GRID:
            raise UserError(f"'{key}' differs from run to run of a table; use {SET_BY_GRID[key]} instead.")
    values = {key.removeprefix("grid."): value for key, value in defaults.items() if key.startswith("grid.")}
    grid = build(Grid, values | _grid_settings(settings), "grid")
    order = Order(table, budget, grid, out, data, manifest, tuple(unlabelled), tuple(settings))
    for row in order.rows:
        order.pretrain_recipe(row, 0)
    for fraction in order.fractions:
        order.finetune_recipe(fraction, 0)
    return order


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


def cells(order: Order, left_out: Iterable[str] = ()) -> Iterator[tuple[str, float, int]]:
    """Yield (row, fraction, seed) of every fine-tuning, a whole table with one seed before the next seed begins."""
    rows = [row for row in order.rows if row not in set(left_out)]
    for seed in range(order.grid.seeds):
        for fraction in order.fractions:
            yield from ((row, fraction, seed) for row in rows)


def run_pretraining(order: Order, row: str, seed: int) -> None:
    """Pre-train a row's encoder, unless that is done.

    Raises NotTrainedError when the training itself ends badly, and UserError for a folder of other settings or data.
    """
    recipe, folder = order.pretrain_recipe(row, seed), order.pretraining(row, seed)
    assert recipe is not None
    budget = parse_time(recipe.run.time)
    with Run(folder, "pretrain", recipe.resolved(), budget) as run, interruptible(run):
        if (folder / "pretrain" / "stage.json").exists():
            return
        configure_torch(recipe)
        _borrow_audit(folder, [order.pretraining(other, n) for other in order.rows for n in range(order.grid.seeds)])
        data = prepare(run, recipe)
        try:
            pretrain(run, recipe, data, budget)
        except UserError as error:
            raise NotTrainedError(str(error)) from None


def run_finetuning(order: Order, row: str, fraction: float, seed: int, unseen: Sequence[Case] = ()) -> None:
    """Fine-tune and score one cell with one seed, unless that is done; other settings raise a UserError."""
    recipe, folder = order.finetune_recipe(fraction, seed), order.finetuning(row, fraction, seed)
    weights = recipe.model.weights
    if order.rows[row].recipe is not None:
        weights = str(order.pretraining(row, seed) / "pretrain" / "model.safetensors")
    budget = parse_time(recipe.run.time)
    with Run(folder, "finetune", recipe.resolved(), budget) as run, interruptible(run):
        missing = {"test", *(["unseen"] if unseen else [])} - scored(folder)
        if not missing:
            return
        configure_torch(recipe)
        _borrow_audit(folder, [order.finetuning(*cell) for cell in cells(order)])
        data = prepare(run, recipe)
        finetune(run, recipe, data, weights, budget)
        for key, cases in (("test", data.of_split("test")), ("unseen", unseen)):
            if is_main() and key in missing:
                evaluate_cases(folder, cases, key)
                run.check_stop()


def scored(folder: Path) -> set[str]:
    """Return the data sets a run has been scored on."""
    path = folder / "metrics.json"
    return set(read_metrics(path)) if path.exists() else set()


def _borrow_audit(folder: Path, others: Iterable[Path]) -> None:
    """Copy the audit of another run of the grid; `prepare` takes it if it is of the same data, and audits otherwise."""
    found = next((path for other in others if (path := other / "audit.json").exists()), None)
    if found is not None and not (folder / "audit.json").exists() and is_main():
        shutil.copyfile(found, folder / "audit.json")

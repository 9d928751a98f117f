"""What a paper's table is asked for: its budgets, and words that it does not know."""

from __future__ import annotations

import pytest

from fewmask.commands.grid import place_order
from fewmask.commands.reproduce import reproduce
from fewmask.commands.tables import TABLES
from fewmask.types import UserError


@pytest.mark.parametrize("name", [name for name, what in TABLES.items() if "gpu" in what.budgets])
def test_the_gpu_budget_is_the_full_one_but_for_its_times(name, tmp_path):
    gpu, full = (place_order(name, budget, tmp_path, tmp_path, None, (), ()) for budget in ("gpu", "full"))
    for row in full.rows:
        for ours, theirs in zip(gpu.jobs(row, 0.1, 0), full.jobs(row, 0.1, 0), strict=True):
            run = ours.recipe.run.model_copy(update={"time": theirs.recipe.run.time})
            assert ours.recipe.model_copy(update={"run": run}) == theirs.recipe
            assert ours.recipe.run.time != theirs.recipe.run.time


@pytest.mark.parametrize(
    ("table_name", "settings", "message"),
    [
        ("g2ll-table", (), "Did you mean 'g2ll-table"),
        ("tedmae", ("run.seed=3",), "use grid.seeds"),
        ("tedmae", ("grid.seeds=0",), r"grid\.seeds must be"),
        ("tedmae", ("pretrain.method=mae",), "differs from run to run of a table; use grid.rows"),
        ("tedmae", ("pretrain.method.name=mae",), "use grid.rows"),
        ("boundary-distillation", ("distill.method=distill",), "use grid.rows"),
        ("tedmae", ('grid.rows=["al"]',), "Did you mean 'all'"),
        ("tedmae", ("pretrain.epohcs=3",), "Did you mean 'pretrain.epochs'|Did you mean 'epochs'"),
        ("tedmae", (), "missing: give the folder"),
    ],
)
def test_a_wrong_word_gets_a_sentence(table_name, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce(table_name, tmp_path / "nowhere", None, "smoke", (), None, tmp_path / "out", settings)


def test_data_without_splits_are_refused(drawn, tmp_path):
    with pytest.raises(UserError, match=r"for val and test.*column 'split'"):
        reproduce("tedmae", drawn, None, "smoke", (), None, tmp_path / "out")

"""What a table tells of where it leaves its paper's setting."""

from __future__ import annotations

import inspect

import pytest

from fewmask.commands.grid import place_order
from fewmask.commands.papers import PAPERS, deviations
from fewmask.commands.tables import TABLES
from fewmask.config import StageSection
from fewmask.finetune import FINETUNERS
from fewmask.pretrain import PRETRAINERS


@pytest.mark.parametrize("name", [name for name, what in TABLES.items() if not what.distils])
def test_the_full_budget_is_the_papers_setting(name, tmp_path):
    order = place_order(name, "full", tmp_path, tmp_path, None, (), ())
    recipes = {row: recipe for row in order.rows if (recipe := order.pretrain_recipe(row, 0)) is not None}
    assert len(recipes) == len(order.rows) - 1
    theirs = {row: recipe for row, recipe in recipes.items() if not row.endswith("-light")}
    told = deviations(PAPERS[name], "pretrain", theirs)
    told += deviations(PAPERS[name], "finetune", {"all": order.finetune_recipe(1.0, 0)})
    assert [text for text in told if "does not say" not in text] == []


def other(value):
    """Return another value of about the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return tuple(number / 2 for number in value)
    return {"changed": 1} if isinstance(value, dict) else "changed"


# What decides nothing of what is learnt, and what a row is there to vary.
STAGE_KEYS = set(StageSection.model_fields) - {
    "method", "instead", "instead_lr", "checkpoint_seconds", "share", "probe_every",
}  # fmt: skip
OF_ROWS = {"mae": {"mask"}, "tedmae": {"teacher", "ec", "df"}}
IDLE = {
    "mae": {"focal_share", "num_segments"}, "tedmae": {"focal_share", "num_segments"},
    "dino": {"local_size", "local_scale"}, "segment": {"freeze_encoder"},
}  # fmt: skip
ROWS = [
    *(("g2ll-table1", row) for row in ("supervised", "mae", "dino", "g2ll", "tedmae")),
    ("g2ll-table2", "mask-semantic-focal"),
    ("tedmae", "all"),
]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # a word that is none of a setting's
@pytest.mark.parametrize(("name", "row"), ROWS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_whatever_setting_is_changed_is_told(name, row, stage, tmp_path):
    order = place_order(name, "full", tmp_path, tmp_path, None, (), ())
    recipe = order.pretrain_recipe(row, 0) if stage == "pretrain" else order.finetune_recipe(1.0, 0)
    section = recipe.stage(stage)
    method = section.method["name"]
    before = deviations(PAPERS[name], stage, {row: recipe})

    def told(**changes):
        return deviations(PAPERS[name], stage, {row: recipe.model_copy(update=changes)})

    for key in STAGE_KEYS:
        changed = section.model_copy(update={key: other(getattr(section, key))})
        assert f"{stage}.{key}" in " ".join(set(told(**{stage: changed})) - set(before)), key
    model_keys = {"size", "weights", "encoder_settings"} | ({"segmenter_settings"} if stage == "finetune" else set())
    for key in model_keys:
        changed = recipe.model.model_copy(update={key: other(getattr(recipe.model, key))})
        assert f"model.{key}" in " ".join(set(told(model=changed)) - set(before)), key
    factory = {**PRETRAINERS, **FINETUNERS}[method]
    given = {"encoder", "segmenter", "num_classes", "size", "collapse_patience"}
    idle = IDLE.get(method, set()) if row != "mask-semantic-focal" or stage == "finetune" else set()
    for key, parameter in inspect.signature(factory).parameters.items():
        if key in given | idle | OF_ROWS.get(method, set()):
            continue
        value = other(section.method.get(key, parameter.default))
        changed = section.model_copy(update={"method": {**section.method, key: value}})
        assert key in " ".join(set(told(**{stage: changed})) - set(before)), key


@pytest.mark.parametrize(("num_local", "scale"), [(0, (0.14, 1.0)), (2, (0.4, 1.0))])
def test_the_crops_that_dino_takes_unless_told_are_told(tmp_path, num_local, scale):
    given = (f"pretrain.method.num_local={num_local}",)
    recipe = place_order("g2ll-table1", "full", tmp_path, tmp_path, None, (), given).pretrain_recipe("dino", 0)
    told = " ".join(deviations(PAPERS["g2ll-table1"], "pretrain", {"dino": recipe}))
    assert f"crop_scale ({scale})" in told


def test_a_row_tells_of_a_setting_only_if_it_uses_it(tmp_path):
    order = place_order("tedmae", "full", tmp_path, tmp_path, None, (), ())
    about = {}
    for row in ("mae", "teacher", "ec", "all"):
        recipe = order.pretrain_recipe(row, 0)
        told = " ".join(deviations(PAPERS["tedmae"], "pretrain", {row: recipe}))
        about[row] = [key for key in ("momentum", "conversion", "reduction") if f" {key} (" in told]
    every = ["momentum", "conversion", "reduction"]
    assert about == {"mae": [], "teacher": every[:1], "ec": every[:2], "all": every}

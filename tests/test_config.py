"""Recipes: three layers, strict keys, and sentences that name them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewmask.cli import app
from fewmask.config import STAGES, load_recipe, parse_time, recipes_with, shipped_recipes
from fewmask.registry import build, choose
from fewmask.types import UserError


class Method:
    """A method as a recipe sees it."""

    def __init__(self, encoder: object, *, ratio: float = 0.75, depth: int = 2, kind: str = "a", flag: bool = False):
        self.__dict__.update(encoder=encoder, ratio=ratio, depth=depth, kind=kind, flag=flag)


def test_three_layers_in_order(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[run]\nseed = 3\n[finetune]\nepochs = 7\nmethod = { name = "segment" }\n')
    recipe = load_recipe(path, ["finetune.epochs=9", "run.time=15m"])
    assert (recipe.run.seed, recipe.finetune.epochs, recipe.finetune.batch_size) == (3, 9, 16)
    assert recipe.run.time == "15m"
    assert recipe.pretrain is None


def test_method_is_short_for_the_stage(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[pretrain]\nmethod = { name = "mae" }\n')
    recipe = load_recipe(path, ["method.mask_ratio=0.6"], stage="pretrain")
    assert recipe.pretrain.method == {"name": "mae", "mask_ratio": 0.6}


@pytest.mark.parametrize("name", ["method=rotation", "method.name=rotation"])
def test_another_method_does_not_take_the_settings_of_the_recipes_own(name):
    recipe = load_recipe("mae", ["method.crop_scale=[0.5,1.0]", name], stage="pretrain")
    assert recipe.pretrain.method == {"name": "rotation", "crop_scale": [0.5, 1.0]}
    assert load_recipe("mae", ["method.name=mae"], stage="pretrain").pretrain.method["mask_ratio"] == 0.75


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.epoch=3", "Unknown setting 'finetune.epoch'. Did you mean 'epochs'?"),
        ("run.sed=3", "Did you mean 'seed'?"),
        ("runn.seed=3", "Did you mean 'run'?"),
        ("finetune.epochs=many", "Setting 'finetune.epochs' cannot be 'many'"),
        ("finetune.epochs=true", "a number is wanted, not true or false"),
        ("finetune.lr=false", "a number is wanted, not true or false"),
        ("finetune.epochs=-1", "Setting 'finetune.epochs' cannot be -1"),
        ("run.time=soon", "a time is written like 15m"),
        ("run.time=0s", "above zero"),
        ("run.time=20", "a time is written like 15m"),
        ("data.unlabelled=more", """takes a list: write 'data.unlabelled=["more"]'"""),
        ("data.label_fraction=0", "Setting 'data.label_fraction' cannot be 0"),
        ("data.label_fraction=1.5", "cannot be 1.5"),
        ("run.device=gpu", "cannot be 'gpu'"),
        ("finetune.probe_every=2", "'finetune.probe_every' is of no use: the probe looks at pre-training only"),
        ("finetune.epochs", "write it as key=value"),
        ("run.seed.deep=3", "is a value and not a section"),
    ],
)
def test_a_bad_setting_is_one_sentence(override, words):
    with pytest.raises(UserError) as error:
        load_recipe("run", ["run.seed=1", override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["2026", "2026-11-22", "07:30:00", "1.50", "true", "plain"])
def test_a_folder_may_have_any_name(name):
    recipe = load_recipe("run", [f"run.out={name}", f"data.root={name}"])
    assert (str(recipe.run.out), str(recipe.data.root)) == (name, name)


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(UserError, match=r"There is no recipe 'nun'\. Did you mean 'run'"):
        load_recipe("nun")
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\nseed = 1")
    with pytest.raises(UserError, match="is not valid TOML"):
        load_recipe(bad)


def test_a_recipe_without_a_stage_names_those_that_have_it():
    with pytest.raises(
        UserError, match=r"has no \[distill\] section: .* has: mobile_unet, tiny_unet, run, two_stage\."
    ):
        load_recipe("mae").stage("distill")


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "distill", "select"])
def test_help_lists_the_recipes_of_a_verb(verb):
    text = " ".join(CliRunner().invoke(app, [verb, "--help"]).stdout.split())
    listed = re.search(r"shipped: ([^.]*)\.", text).group(1).split(", ")
    own = [name for name in recipes_with(verb) if name not in ("run", "demo")]  # those are the chain's
    assert listed == [name for name in own if verb == "select" or name != "two_stage"]


def test_every_shipped_recipe_is_valid_and_says_how_to_run_it():
    assert {"run", "demo"} <= shipped_recipes().keys()
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        assert any(getattr(recipe, stage) for stage in STAGES)
        assert "fewmask " in path.read_text().split("[")[0]


@given(st.integers(0, 99), st.integers(0, 59), st.integers(1, 59))
def test_times_add_up(hours, minutes, seconds):
    assert parse_time(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


def test_the_constructor_is_the_schema():
    made = build(Method, {"ratio": 1, "kind": "b"}, "method", encoder="given")
    assert (made.ratio, made.kind, made.encoder) == (1.0, "b", "given")
    with pytest.raises(UserError, match=r"Unknown setting 'method.ration'. Valid ones: ratio, depth, kind, flag"):
        build(Method, {"ration": 0.5}, "method", encoder=1)
    with pytest.raises(UserError, match=r"Unknown setting 'method\.encoder'"):
        build(Method, {"encoder": 0.5}, "method", encoder=1)
    with pytest.raises(UserError, match=r"Setting 'method.depth' cannot be 2.5"):
        build(Method, {"depth": 2.5}, "method", encoder=1)
    with pytest.raises(UserError, match=r"Setting 'method.depth' cannot be '3'"):
        build(Method, {"depth": "3"}, "method", encoder=1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"Setting 'method.ratio' cannot be (nan|inf): .*finite"):
            build(Method, {"ratio": value}, "method", encoder=1)
    with pytest.raises(UserError, match=r"Setting 'method.flag' cannot be 'yes'"):
        build(Method, {"flag": "yes"}, "method", encoder=1)


def test_choose_hints_at_the_nearest_name():
    with pytest.raises(UserError, match=r"There is no segmenter named 'unett'. Did you mean 'unet'\? Choose one of: "):
        choose({"unet": 1, "transunet": 2}, "unett", "segmenter")

"""Pre-training by figures in a chain: when it is taken, and what fine-tuning begins with after it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fewmask.commands.chain import LEAST_AGREEMENT, settled, suited, with_instead
from fewmask.commands.stages import objective_for
from fewmask.config import load_recipe
from fewmask.models import load_model
from fewmask.pretrain.figure_rule import find_figure
from fewmask.types import UserError
from tests.commands.conftest import TINY

SIDE = 72
# TINY with the method that `run` takes unless told.
ALONE = [word for word in TINY if not word.startswith("pretrain.method")]
FIGURE = [*ALONE, "pretrain.instead.mask_patch=16"]


def disc(row, column, radius):
    y, x = np.mgrid[:SIDE, :SIDE]
    return (y - row) ** 2 + (x - column) ** 2 < radius**2


def prepared(things, masks):
    """Return data of dark things on light ground, uint8, with masks of their own."""
    images = np.where(np.stack(things)[..., None], (90, 40, 30), (220, 180, 170)).astype(np.uint8)
    coverage = (np.stack(masks) * 255).astype(np.uint8)
    rows = list(range(len(images)))
    return SimpleNamespace(dataset=SimpleNamespace(images=images, masks=coverage), labelled=rows, body=rows)


THINGS = [disc(36, 36 + i, 12 + i) for i in range(4)]
ELSEWHERE = [disc(8, 8, 6)] * 4
NOTHING = [np.zeros((SIDE, SIDE), dtype=bool)] * 4


@pytest.mark.parametrize(
    ("things", "masks", "method"),
    [
        (THINGS, THINGS, "figure"),
        (THINGS, ELSEWHERE, "simmim"),
        (NOTHING, ELSEWHERE, "simmim"),
        (THINGS, NOTHING, "simmim"),
        (THINGS, THINGS[:3] + NOTHING[:1], "figure"),  # an empty mask says nothing about what is marked
        (THINGS[:1] + NOTHING[:3], THINGS, "simmim"),  # what is rarely found agrees rarely
    ],
)
def test_figures_are_learnt_where_they_are_what_the_masks_mark(things, masks, method, capsys):
    recipe = load_recipe("run", [*FIGURE, "pretrain.lr=0.007", "pretrain.method.max_border=0.2"])
    found = suited(recipe, prepared(things, masks), objective_for("pretrain", recipe, "none"))
    assert found.stage("pretrain").method["name"] == method
    assert (found == recipe) == (method == "figure")
    assert found.stage("pretrain").lr == (0.007 if method == "figure" else 5e-4)
    said = capsys.readouterr().err
    assert f"by method '{method}'" in said
    share = float(said.split("Dice of ")[1].split()[0])
    assert (share >= LEAST_AGREEMENT) == (method == "figure")


def test_the_answer_of_a_run_that_began_stands(tmp_path):
    recipe = load_recipe("run", FIGURE)

    def method_of(folder, masks):
        objective = objective_for("pretrain", recipe, "none")
        found = settled(SimpleNamespace(folder=folder), recipe, prepared(THINGS, masks), objective)
        return found.stage("pretrain").method["name"]

    assert method_of(tmp_path, ELSEWHERE) == "simmim"
    assert method_of(tmp_path, THINGS) == "figure"  # nothing was trained yet: who mended the masks is asked anew
    (tmp_path / "pretrain" / "checkpoints").mkdir()
    (tmp_path / "pretrain" / "checkpoints" / "step_000000001.safetensors").touch()
    assert method_of(tmp_path, ELSEWHERE) == "figure"
    (tmp_path / "pretrain" / "method.json").write_text('{"instead": true}')
    assert method_of(tmp_path, THINGS) == "simmim"
    recipe = load_recipe("run", TINY)  # a method that was asked for
    assert method_of(tmp_path, THINGS) == "simmim"


def test_a_method_may_be_given_by_its_name_alone():
    recipe = load_recipe("run", [*FIGURE, "pretrain.instead=dino", "pretrain.instead_lr=0"])
    assert with_instead(recipe).stage("pretrain").method == {"name": "dino"}
    assert with_instead(recipe).stage("pretrain").lr == recipe.stage("pretrain").lr
    assert with_instead(recipe).stage("pretrain").rate == "lr"
    assert with_instead(load_recipe("run", FIGURE)).stage("pretrain").rate == "instead_lr"
    asked_for = load_recipe("run", ["pretrain.method=simmim", "pretrain.lr=5e-4"]).stage("pretrain")
    assert (asked_for.method, asked_for.lr) == (asked_for.instead, asked_for.instead_lr)
    assert asked_for.rate == "lr"
    assert load_recipe("run", ["pretrain.method=mae"]).stage("pretrain").method == {"name": "mae"}
    with_settings = ["pretrain.method=mae", "pretrain.method.mask_ratio=0.5"]
    assert load_recipe("run", with_settings).stage("pretrain").method == {"name": "mae", "mask_ratio": 0.5}
    with pytest.raises(UserError, match=r"'pretrain\.instead' cannot be 3"):
        load_recipe("run", [*ALONE, "pretrain.instead=3"])
    with pytest.raises(UserError, match=r"it needs a name: set pretrain\.instead\.name"):
        load_recipe("run", [*ALONE, "pretrain.instead={}"])


@pytest.mark.parametrize("words", [TINY, [*FIGURE, "pretrain.instead=none"]])
def test_another_method_and_one_insisted_on_are_left_as_they_are(words):
    recipe = load_recipe("run", words)
    assert suited(recipe, prepared(THINGS, ELSEWHERE), objective_for("pretrain", recipe, "none")) is recipe


def test_images_without_a_figure_are_not_learnt_from_by_figures_whatever_the_masks_say(capsys):
    recipe = load_recipe("run", FIGURE)
    data = prepared([*THINGS, *NOTHING * 20], [*THINGS, *NOTHING * 20])
    data.labelled = [0, 1, 2, 3]
    found = suited(recipe, data, objective_for("pretrain", recipe, "none"))
    assert found.stage("pretrain").method == {"name": "simmim", "mask_patch": 16}
    assert "finds a thing in 5% of images" in capsys.readouterr().err


def test_a_method_that_cannot_take_its_place_is_told_before_the_run(tmp_path, fewmask):
    words = [*FIGURE, "model.size=64", "pretrain.instead.mask_patch=24"]
    code, _, err = fewmask("run", draw(tmp_path / "data"), "--out", tmp_path / "run", *words)
    assert code == 1
    assert "'mask_patch' = 24 does not divide the image size 64" in err
    assert "pretrain.instead=none" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unexported")
def test_the_chain_takes_the_other_method_to_its_end(tmp_path, fewmask):
    data = draw(tmp_path / "data")
    for path in (data / "masks").iterdir():  # masks of another thing
        Image.fromarray((ELSEWHERE[0] * 255).astype(np.uint8)).save(path)
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *FIGURE, "model.size=64")
    assert code == 0, err
    assert "by method 'simmim' instead of 'figure'" in err
    assert json.loads((tmp_path / "run" / "pretrain" / "stage.json").read_text())["method"] == "simmim"
    path = tmp_path / "run" / "pretrain" / "model.safetensors"
    assert f"finetune: begins with the encoder alone of {path}" in err
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *FIGURE, "model.size=64")
    assert code == 0, err
    assert "instead of" not in err  # what is done is not asked about again


def test_agreement_is_the_mean_dice_over_the_masks_that_mark_something():
    objective = objective_for("pretrain", load_recipe("run", FIGURE), "none")
    half = [thing & (np.arange(SIDE) < 36 + i) for i, thing in enumerate(THINGS)]
    data = prepared([*THINGS, *NOTHING[:1], *THINGS[:1]], [*half, *THINGS[:1], *NOTHING[:1]]).dataset
    figures, told = find_figure(torch.from_numpy(data.images).permute(0, 3, 1, 2), objective.figure_views.rule)
    assert told.tolist() == [True] * 4 + [False, True]
    cover = F.interpolate(figures.float(), (SIDE, SIDE), mode="bilinear")[:, 0].numpy() >= 0.5
    each = [2 * (h & c).sum() / (h.sum() + c.sum()) for h, c in zip(half, cover, strict=False)]
    every = np.resize(range(6), 36)  # more than are looked at together
    for rows in ([*range(6)], every):
        agreement = objective.agreement(data.images, data.masks, rows)
        assert agreement == pytest.approx(sum(each) / 5)  # the fifth is not found
    assert objective.agreement(data.images, data.masks, [5]) == objective.agreement(data.images, data.masks, []) == 0


def draw(folder, num=12, num_masked=10):
    """Write pictures of one dark disc each, the first `num_masked` with a mask; return their folder."""
    for kind in ("images", "masks") if num_masked else ("images",):
        (folder / kind).mkdir(parents=True)
    for i in range(num):
        thing = disc(32 + i % 5, 40 - i % 7, 12 + i)
        picture = np.where(thing[..., None], (90, 40 + i, 30), (220, 180, 170 - i)).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{i:02d}.png")
        if i < num_masked:
            Image.fromarray((thing * 255).astype(np.uint8)).save(folder / "masks" / f"{i:02d}.png")
    return folder


@pytest.mark.usefixtures("unexported")
def test_the_chain_begins_its_fine_tuning_with_the_decoder_that_learnt_figures(tmp_path, fewmask):
    code, _, err = fewmask("run", draw(tmp_path / "data"), "--out", tmp_path / "run", *FIGURE, "model.size=64")
    assert code == 0, err
    assert "by method 'figure'" in err
    path = tmp_path / "run" / "pretrain" / "model.safetensors"
    facts = json.loads((tmp_path / "run" / "finetune" / "stage.json").read_text())
    assert facts["weights"] == str(path)
    assert f"finetune: begins with encoder and decoder of {path}" in err
    learnt, _ = load_model(path)
    recipe = load_recipe("run", [*FIGURE, "model.size=64"])
    start = objective_for("finetune", recipe, str(path)).segmenter.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in learnt.state_dict().items())


def test_pictures_without_any_mask_give_a_model_that_draws_first_ones(tmp_path, fewmask):
    data, run = draw(tmp_path / "data", num_masked=0), tmp_path / "run"
    words = [word for word in ALONE if not word.startswith(("finetune", "distill", "model.size"))]
    words += ["model.size=64", "pretrain.epochs=15", "pretrain.lr=0.01", f"data.root={data}", f"run.out={run}"]
    code, _, err = fewmask("pretrain", "figure", *words)
    assert code == 0, err
    code, _, err = fewmask("predict", run, data / "images", "--out", tmp_path / "masks")
    assert code == 0, err
    dice = []
    for i in range(12):
        with Image.open(tmp_path / "masks" / f"{i:02d}.png") as mask:
            found = np.asarray(mask) > 0
        thing = disc(32 + i % 5, 40 - i % 7, 12 + i)
        dice.append(2 * (found & thing).sum() / (found.sum() + thing.sum()))
    assert np.mean(dice) > 0.8
    code, _, err = fewmask("finetune", "unet", f"data.root={data}", f"run.out={tmp_path / 'fine'}")
    assert code == 1
    assert "The data hold no masks" in err
    (tmp_path / "masks").rename(data / "masks")  # corrected, say
    code, _, err = fewmask("evaluate", run, data)
    assert code == 1
    assert "has learnt from all these images, without their masks" in err


def test_one_mask_is_too_few_to_be_split_and_is_left_aside(tmp_path, fewmask):
    data, run = draw(tmp_path / "data", num_masked=1), tmp_path / "run"
    words = [word for word in ALONE if not word.startswith(("finetune", "distill"))]
    code, _, err = fewmask("pretrain", "figure", *words, f"data.root={data}", f"run.out={run}")
    assert code == 0, err
    assert "too few to set any aside" in err
    uses = json.loads((run / "contents.json").read_text())
    assert set(uses.values()) == {"unlabelled"}
    assert len(uses) == 12

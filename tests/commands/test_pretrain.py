"""`fewmask pretrain` by name: what a method is given of the data, what it leaves to look at, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fewmask.auxiliary import AUXILIARY
from fewmask.commands.defaults import METHODS, defaults_of, method_defaults
from fewmask.commands.features import know_whole_images
from fewmask.config import load_recipe
from fewmask.data.reading import read_image
from fewmask.models import Encoder
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.mae import MAE
from fewmask.types import UserError
from tests.commands.conftest import read_rows, write_rows
from tests.pretrain.test_contract import objective

SHORT = (
    "model.encoder=vit_tiny_patch16", "model.size=32", "pretrain.epochs=1", "pretrain.min_epoch_steps=2",
    "pretrain.batch_size=4", "run.device=cpu",
)  # fmt: skip
SMALL = ("pretrain.method.num_prototypes=12", "pretrain.method.projector_hidden=16", "pretrain.method.decoder_depth=1")


class Seen(G2LL):
    """Notes how many regions the superpixels of the pictures have that it is shown."""

    regions: list[int] = []

    def forward(self, batch):
        self.regions += [len(torch.unique(one)) for one in batch.extra["superpixels"]]
        return super().forward(batch)


def test_g2ll_is_given_superpixels_and_its_report_shows_them(drawn, tmp_path, monkeypatch, fewmask):
    monkeypatch.setitem(METHODS["pretrain"], "g2ll", Seen)
    Seen.regions.clear()
    run = tmp_path / "run"
    code, _, err = fewmask("pretrain", "g2ll", f"data.root={drawn}", f"run.out={run}", *SHORT, *SMALL)
    assert code == 0, err
    assert len(Seen.regions) % 4 == 0  # whole batches
    assert max(Seen.regions) > 2  # crops of drawn pictures that SLIC has cut into about eight parts
    assert fewmask("report", run, "--out", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    for words in ("Superpixels", "Reconstruction", "Loss term: reconstruction", "Loss term: distillation"):
        assert words in page
    assert {read_image(path).shape for path in (run / "pretrain" / "preview").iterdir()} == {(32, 4 * 32, 3)}


def test_a_cnn_is_kept_with_the_statistics_of_whole_images(drawn, tmp_path, monkeypatch, fewmask):
    """Those of seven steps of training, of pictures with parts painted over, would have been counted seven times.

    What it paints is shown before, while it knows such pictures.
    """
    shown = []

    def know(*given):
        shown.extend(path.name for path in (tmp_path / "pretrain" / "preview").iterdir())
        know_whole_images(*given)

    monkeypatch.setattr("fewmask.commands.stages.know_whole_images", know)
    words = ("model.encoder=resnet18", "model.size=64", "model.weights=none", "pretrain.min_epoch_steps=7")
    code, _, err = fewmask("pretrain", "simmim", f"data.root={drawn}", f"run.out={tmp_path}", *SHORT, *words)
    assert code == 0, err
    kept = load_file(tmp_path / "pretrain" / "model.safetensors")
    counted = {int(value) for name, value in kept.items() if name.endswith("num_batches_tracked")}
    num_images = json.loads((tmp_path / "pretrain" / "features.json").read_text())["num_candidates"]
    assert counted == {max(1, num_images // 32)}
    assert "reconstruction_00.png" in shown


def stop(*_):
    raise KeyboardInterrupt


class Later(MAE):
    """MAE as another version may have it: it hides less unless told."""

    def __init__(self, encoder: Encoder, mask_ratio: float = 0.5) -> None:
        super().__init__(encoder, mask_ratio)


def test_a_run_does_not_go_on_with_what_a_later_version_takes_unless_told(drawn, tmp_path, monkeypatch, fewmask):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[model]\nencoder = "vit_tiny_patch16"\nsize = 32\nweights = "none"\n[pretrain]\nmethod = "mae"\n'
    )
    words = (recipe, f"data.root={drawn}", f"run.out={tmp_path / 'run'}", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("fewmask.commands.stages.know_whole_images", stop)
        assert fewmask("pretrain", *words)[0] == 130
    monkeypatch.setitem(METHODS["pretrain"], "mae", Later)
    code, _, err = fewmask("pretrain", *words)
    assert code == 1
    assert "pretrain.method.mask_ratio=0.75, where this version takes 0.5 unless told; use" in err
    assert fewmask("pretrain", *words, "pretrain.method.mask_ratio=0.75")[0] == 0


def test_the_defaults_of_a_recipe_are_those_of_its_methods_and_losses():
    recipe = load_recipe("tiny_unet", ["distill.method.losses={m2bf={}, kd={}}"])
    found = method_defaults(recipe)["distill"]["method"]
    assert found["losses"]["m2bf"]["weight"] == 0.1
    assert found["losses"]["kd"].items() >= {"weight": 1.0, "temperature": 4.0}.items()
    assert found["average"] == 0.0  # the recipe says 0.99
    method = {"name": "joint", "task": "rotation"}
    joint = load_recipe("unet", given={"finetune.method": method})
    assert method_defaults(joint)["finetune"]["method"]["task_settings"] == defaults_of(AUXILIARY["rotation"])
    both = load_recipe("unet", given={"finetune.method": {**method, "task": ["restoration"]}})
    kept = method_defaults(both)["finetune"]["method"]["task_settings"]
    assert kept == {"restoration": defaults_of(AUXILIARY["restoration"])}
    assert kept["restoration"]["shuffle"] == 0.5
    with pytest.raises(UserError, match="no distillation loss named 'mbv'"):
        method_defaults(load_recipe("tiny_unet", ["distill.method.losses={mbv={}}"]))


@pytest.mark.parametrize("method", ["g2ll", "tedmae", "dino", "mae method=contrastive"])
def test_a_batch_of_one_is_refused_before_the_superpixels_are_made(method, drawn, tmp_path, monkeypatch, fewmask):
    made = []
    monkeypatch.setattr("fewmask.commands.stages.superpixel_maps", lambda *_, **__: made.append(method))
    words = (f"data.root={drawn}", f"run.out={tmp_path / 'run'}", *SHORT, "pretrain.batch_size=1")
    code, _, err = fewmask("pretrain", *method.split(), *words)
    assert code == 1
    name = method.split("=")[-1]
    assert f"'{name}' compares the images of a batch, and pretrain.batch_size is 1: set it to 2 or more" in err
    assert made == []


@pytest.mark.parametrize("method", ["g2ll", "tedmae", "dino", "mae method=contrastive"])
def test_what_compares_images_is_refused_a_single_one(method, drawn, tmp_path, fewmask):
    """Copies of it would fill the batch, and be compared with themselves."""
    (tmp_path / "one" / "images").mkdir(parents=True)
    shutil.copy(next((drawn / "images").iterdir()), tmp_path / "one" / "images")
    words = (f"data.root={tmp_path / 'one'}", f"run.out={tmp_path / 'run'}", *SHORT)
    code, _, err = fewmask("pretrain", *method.split(), *words)
    assert code == 1
    assert "compares images, and there is only one to learn from" in err
    assert not (tmp_path / "run" / "pretrain" / "model.safetensors").exists()


def test_images_that_supervised_has_no_label_for_are_told(drawn, tmp_path, fewmask):
    data, run = shutil.copytree(drawn, tmp_path / "data"), tmp_path / "run"
    rows = read_rows(data / "manifest.csv")
    for number, row in enumerate(rows):
        row["split"], row["label"] = "train" if row["mask"] else "", ("a", "b", "")[number % 3]
    write_rows(data / "manifest.csv", rows)
    code, _, err = fewmask("pretrain", "supervised", f"data.root={data}", f"run.out={run}", *SHORT)
    assert code == 0, err
    kept = {row["image"] for row in read_rows(run / "cases.csv") if row["use"] in ("labelled", "unlabelled")}
    unlabelled = [row for row in rows if not row["label"] and str(data / row["image"]) in kept]
    assert f"{len(unlabelled)} images without a class label are left out" in err
    assert json.loads((run / "pretrain" / "stage.json").read_text())["num_images"] == len(kept) - len(unlabelled)


def test_supervised_is_refused_where_all_that_it_trains_on_is_of_one_class(drawn, tmp_path, fewmask):
    data = shutil.copytree(drawn, tmp_path / "data")
    rows = read_rows(data / "manifest.csv")
    for row in rows:
        row["split"], row["label"] = ("val", "b") if row["group"] == rows[0]["group"] else ("train", "a")
    write_rows(data / "manifest.csv", rows)
    code, _, err = fewmask("pretrain", "supervised", f"data.root={data}", f"run.out={tmp_path / 'run'}", *SHORT)
    assert code == 1
    assert "all of one class" in err
    assert not (tmp_path / "run" / "pretrain" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("g2ll", "mask_ratio=nan", "finite"),
        ("mae", "mask_ratio=inf", "finite"),
        ("g2ll", "tau_t=inf", "finite"),
        ("tedmae", "distillation_weight=nan", "finite"),
        ("dino", "crop_scale=[1.5, 2.0]", "'crop_scale' cannot be"),
        ("dino", "local_scale=[0.5, 1.1]", "'local_scale' cannot be"),
        ("mae", "crop_scale=[0.5, 1.5]", "'crop_scale' cannot be"),
    ],
)
def test_impossible_numbers_of_a_method_are_told(method, setting, words, drawn, tmp_path, fewmask):
    given = (f"data.root={drawn}", f"run.out={tmp_path / 'run'}", *SHORT, f"pretrain.method.{setting}")
    code, _, err = fewmask("pretrain", method, *given)
    assert code == 1
    assert words in err[err.rindex("fewmask: ") :]
    assert "Traceback" not in err


@pytest.mark.parametrize("recipe", ["g2ll", "tedmae", "dino"])
def test_what_the_guard_advises_can_be_set(recipe):
    keys = re.findall(r"pretrain(?:\.\w+)+", objective(recipe).guard.advice)
    assert len(keys) >= 4
    for key in keys:
        value = "8" if key.endswith("batch_size") else "0.5"
        for name in (recipe, "run"):
            words = [f"{key}={value}"] if name == recipe else [f"pretrain.method={recipe}", f"{key}={value}"]
            load_recipe(name, words)
        if key.startswith("pretrain.method."):
            objective(recipe, **{key.rsplit(".", 1)[-1]: 0.5})


def test_a_cosine_has_no_temperature_to_lower():
    assert "tau_t" in objective("tedmae").guard.advice
    assert "tau_t" not in objective("tedmae", distillation="cosine").guard.advice

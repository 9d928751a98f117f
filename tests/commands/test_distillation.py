"""Distillation as a verb and as the chain's last stage: who teaches, on which images, and what is said of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fewmask.commands.distillation import best_of, find_teacher, find_teachers, lost_and_gained, predicts_once
from fewmask.commands.predictions import Answers
from fewmask.config import DistillSection, load_recipe
from fewmask.data.augment import PlainViews
from fewmask.data.contents import default_cache_folder
from fewmask.data.loader import Loader
from fewmask.data.synthetic import make_dataset
from fewmask.engine.device import resolve_precision
from fewmask.engine.run import Run
from fewmask.engine.stage import Stage
from fewmask.models.storage import read_model_file, write_model_file
from fewmask.types import UserError
from tests.commands.conftest import DISTILLING, finish_chain, write_rows
from tests.commands.test_chain import table

STUDENT = (
    "model.size=32", "distill.epochs=1", "distill.min_epoch_steps=2", "distill.batch_size=4", "run.device=cpu",
    "distill.method.losses={kd = {weight = 1.0}}",
)  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory, drawn):
    """A finished chain: the teacher in finetune, the student in distill."""
    return finish_chain(tmp_path_factory, drawn, DISTILLING)


def facts(run, stage="distill"):
    """Return what a stage left."""
    return json.loads((run / stage / "stage.json").read_text())


def test_the_chain_ends_with_its_student(taught):
    assert facts(taught)["teachers"] == [str(taught / "finetune" / "model.safetensors")]
    teacher, student = (load_file(taught / stage / "model.safetensors") for stage in ("finetune", "distill"))
    sizes = [sum(array.size for array in tensors.values()) for tensors in (teacher, student)]
    assert sizes[1] < sizes[0] / 10
    exported = json.loads((taught / "export.json").read_text())
    assert exported["num_parameters"] <= sizes[1]


@pytest.mark.parametrize(
    ("stage", "name"), [("pretrain", "reconstruction"), ("finetune", "augmented"), ("distill", "teacher_and_student")]
)
def test_every_stage_shows_what_it_was_trained_on(taught, stage, name):
    assert {f"{name}_{number:02d}.png" for number in range(4)} <= {
        p.name for p in (taught / stage / "preview").iterdir()
    }


def test_the_chain_says_what_was_lost_and_gained(taught):
    found = json.loads((taught / "distill" / "comparison.json").read_text())
    own = json.loads((taught / "metrics.json").read_text())["test"]["dice"]["mean"]
    other = json.loads((taught / "finetune" / "metrics.json").read_text())["test"]["dice"]["mean"]
    test = found["splits"]["test"]
    assert test["student"]["dice"] == pytest.approx(own)
    assert test["teacher"]["dice"] == pytest.approx(other)
    assert test["difference"] == pytest.approx(own - other)
    assert found["student"]["num_parameters"] < found["teacher"]["num_parameters"]
    assert f"{other:.4f} -> {own:.4f}" in lost_and_gained(found)


def test_every_image_that_may_be_learnt_from_takes_part(taught, drawn, tmp_path, fewmask):
    words = ("data.root=" + str(drawn), f'distill.teachers=["{taught}"]', *STUDENT)
    assert fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'all'}")[0] == 0
    assert fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'few'}", "distill.unlabelled=false")[0] == 0
    every, labelled = facts(tmp_path / "all"), facts(tmp_path / "few")
    assert labelled["num_images"] == labelled["num_labelled"]
    assert every["num_images"] == labelled["num_labelled"] + 8  # the drawn images without a mask


def test_predictions_made_once_are_learnt_from_and_kept_for_the_next_student(taught, drawn, tmp_path, fewmask):
    words = (
        "data.root=" + str(drawn), f'distill.teachers=["{taught}"]', *STUDENT, "distill.predict_once=true",
        "distill.method.losses={}", "distill.method.pseudo_weight=1.0",
    )  # fmt: skip
    out = tmp_path / "once"
    code, _, err = fewmask("distill", "tiny_unet", *words, f"run.out={out}")
    assert code == 0, err
    kept = {path: path.stat().st_mtime_ns for path in (default_cache_folder() / "predictions").iterdir()}
    assert len(kept) == 1
    logged = [json.loads(line) for line in (out / "distill" / "log.jsonl").read_text().splitlines()]
    assert any(line.get("pseudo", 0) > 0 for line in logged)
    assert fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'other'}", "distill.lr=0.01")[0] == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.parametrize(
    ("method", "once"),
    [
        ({}, True),  # kd, unless told
        ({"losses": {"kd": {}}, "ensemble": "average"}, True),
        ({"losses": {"kd": {}}, "ensemble": "mean_kl"}, True),
        ({"losses": {"kd": {}, "mbf": {}}}, False),
        ({"losses": {}}, False),
        ({"losses": {}, "pseudo_weight": 1.0}, True),
    ],
)
def test_teachers_are_asked_once_wherever_predictions_are_enough(method, once):
    section = DistillSection(epochs=1, batch_size=4, lr=1e-3, method={"name": "distill", **method})
    assert predicts_once(section) is once
    assert not predicts_once(section.model_copy(update={"predict_once": False}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("distill.teachers=[]",), "no teacher"),
        (('distill.teachers=["nowhere"]',), "nowhere is no model file and no run folder"),
        (
            ("distill.predict_once=true", "distill.method.losses={}", "distill.method.pseudo_weight=0"),
            "nothing would learn from the predictions",
        ),
        (("student.segmenter=unet",), "unet"),
        (("student.weights=packaged",), "no package with weights for the encoder 'tiny'"),
        (("student.weights=teacher",), "holds weights of the encoder 'vit_micro_patch8', but this one is 'tiny'"),
        (("distill.method.losses={nope = {}}",), "no distillation loss named 'nope'"),
        (("distill.method.losses=false",), "Setting 'distill.method.losses' cannot be False"),
        (
            ("distill.method.losses={}", "distill.method.pseudo_weight=high"),
            "Setting 'distill.method.pseudo_weight' cannot be 'high'",
        ),
        (("student.encoder_settings.foo=2",), "Unknown setting 'student.encoder_settings.foo'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(taught, drawn, tmp_path, fewmask, words, said):
    given = ("data.root=" + str(drawn), f"run.out={tmp_path / 'out'}", f'distill.teachers=["{taught}"]', *STUDENT)
    code, _, err = fewmask("distill", "tiny_unet", *given, *words)
    assert code == 1
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("losses", "fits"), [("{kd = {}}", True), ("{kd = {}, cwd = {}}", False), ("{mbf = {}}", True)]
)
def test_one_stored_answer_of_several_teachers_is_refused_where_they_are_averaged(
    losses, fits, taught, drawn, tmp_path, fewmask
):
    other = shutil.copytree(taught, tmp_path / "other")
    words = (
        *STUDENT, f"data.root={drawn}", f"run.out={tmp_path / 'out'}", f'distill.teachers=["{taught}", "{other}"]',
        "distill.predict_once=true", "distill.method.ensemble=mean_kl", f"distill.method.losses={losses}",
    )  # fmt: skip
    code, _, err = fewmask("distill", "tiny_unet", *words)
    assert (code == 0) is fits, err
    assert ("the loss 'cwd' is averaged over the teachers" in err) is not fits


def test_a_teacher_whom_nothing_would_learn_from_is_told_before_it_is_trained(drawn, tmp_path, fewmask):
    """With no loss and every image masked there would be no image to learn the teacher's decision on."""
    words = (*DISTILLING, "distill.method.losses={}", "distill.method.pseudo_weight=1.0", "distill.unlabelled=false")
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *words)
    assert code == 1
    assert "would learn nothing from its teacher" in err
    assert not (tmp_path / "run" / "finetune").exists()
    assert not (tmp_path / "run" / "pretrain").exists()


def test_a_chain_that_could_not_end_does_not_begin(drawn, tmp_path, fewmask):
    words = (*DISTILLING, "student.weights=teacher")
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *words)
    assert code == 1
    assert "set student.encoder=vit_micro_patch8" in err
    assert not (tmp_path / "run" / "pretrain").exists()


def test_a_begun_distillation_keeps_its_teachers(taught, drawn, tmp_path, fewmask):
    (tmp_path / "teacher" / "finetune").mkdir(parents=True)
    file = tmp_path / "teacher" / "finetune" / "model.safetensors"
    file.write_bytes((taught / "finetune" / "model.safetensors").read_bytes())
    words = (
        "data.root=" + str(drawn),
        f"run.out={tmp_path / 'out'}",
        *STUDENT,
        f'distill.teachers=["{file.parent.parent}"]',
    )
    assert fewmask("distill", "tiny_unet", *words)[0] == 0
    (tmp_path / "out" / "distill" / "stage.json").unlink()
    (tmp_path / "out" / "distill" / "checkpoints").mkdir()
    (tmp_path / "out" / "distill" / "checkpoints" / "step_000000001.safetensors").touch()
    spec, tensors = read_model_file(file)
    write_model_file(file, spec, {name: tensor * 1.5 for name, tensor in tensors.items()})
    code, _, err = fewmask("distill", "tiny_unet", *words)
    assert code == 1
    assert "changed since its training began" in err


def test_features_are_stored_beside_predictions_and_shared_with_students_that_need_fewer(
    taught, drawn, tmp_path, fewmask
):
    words = ("data.root=" + str(drawn), f'distill.teachers=["{taught}"]', *STUDENT, "distill.predict_once=true")
    feature_losses = "distill.method.losses={emkd={}, m2bf={}}"
    code, _, err = fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'both'}", feature_losses)
    assert code == 0, err
    logged = [json.loads(line) for line in (tmp_path / "both" / "distill" / "log.jsonl").read_text().splitlines()]
    assert all(any(line.get(name, 0) > 0 for line in logged) for name in ("emkd", "m2bf"))
    kept = set((default_cache_folder() / "predictions").iterdir())
    assert len(kept) == 3  # the predictions, and the maps at strides 4 and 16
    assert fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'one'}")[0] == 0  # kd alone
    assert set((default_cache_folder() / "predictions").iterdir()) == kept


def test_what_is_stored_is_what_the_teacher_says_of_the_plain_image(taught, drawn, tmp_path, monkeypatch, fewmask):
    given = []
    of = Answers.of
    monkeypatch.setattr(Answers, "of", lambda self, rows: given.append((self, rows, of(self, rows))) or given[-1][2])
    words = ("data.root=" + str(drawn), f'distill.teachers=["{taught}"]', *STUDENT, "distill.predict_once=true")
    losses = "distill.method.losses={mbf={}}"
    assert fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'out'}", losses)[0] == 0
    (answers, rows, stored), (level,) = given[0], given[0][0].levels
    loaded = Loader(answers.data.dataset, rows, len(rows), 0, **stored._asdict()).batch(0)
    batch = PlainViews(answers.recipe.model.size)(loaded)
    half = resolve_precision(answers.recipe.run) == "bf16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = answers.teachers[0].eval()(batch.image)
    wanted = output.features[level].float()
    assert (batch.features[0].float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    torch.testing.assert_close(batch.mask[:, 1:], output.logits.float().sigmoid(), rtol=0, atol=0.1)  # resized twice


def test_predictions_belong_to_their_images_whatever_the_order_of_folders(taught, drawn, tmp_path, fewmask):
    more = [make_dataset(tmp_path / name, 0, 3, size=(64, 80), seed=seed) for seed, name in enumerate("ab", start=5)]
    words = (
        "data.root=" + str(drawn), f'distill.teachers=["{taught}"]', *STUDENT, "distill.predict_once=true",
        "distill.method.losses={}", "distill.method.pseudo_weight=1.0",
    )  # fmt: skip
    for number, folders in enumerate((more, more[::-1])):
        listed = json.dumps([str(folder) for folder in folders])
        code, _, err = fewmask(
            "distill", "tiny_unet", *words, f"run.out={tmp_path / str(number)}", f"data.unlabelled={listed}"
        )
        assert code == 0, err
    assert len(list((default_cache_folder() / "predictions").iterdir())) == 2


@pytest.mark.parametrize(
    "words", [("distill", "tiny_unet", 'distill.teachers=["{}"]'), ("finetune", "unet", "model.weights={}")]
)
def test_a_model_that_learnt_from_a_test_image_is_refused(taught, data, tmp_path, fewmask, words):
    used = {Path(row["image"]).name: row for row in table(taught / "cases.csv")}
    moved = next(row["group"] for row in used.values() if row["use"] == "labelled")
    rows = table(data / "manifest.csv")
    for row in rows:
        row["split"] = "test" if row["group"] == moved else used[Path(row["image"]).name]["split"]
    write_rows(data / "manifest.csv", rows)
    *verb, setting = words
    code, _, err = fewmask(
        *verb, f"data.root={data}", f"run.out={tmp_path / 'out'}", "model.size=32", setting.format(taught)
    )
    assert code == 1
    assert "of the test images" in err
    assert not list((tmp_path / "out").glob("*/stage.json"))


def test_what_a_teacher_learnt_is_not_new_to_its_student(taught, drawn, tmp_path, fewmask):
    other, out = make_dataset(tmp_path / "other", 8, 0, size=(64, 80), seed=7), tmp_path / "student"
    words = (f"data.root={other}", f"run.out={out}", f'distill.teachers=["{taught}"]', *STUDENT)
    code, _, err = fewmask("distill", "tiny_unet", *words)
    assert code == 0, err
    learnt = sum(row["use"] in ("labelled", "validation") for row in table(taught / "cases.csv"))
    assert f"Model {taught.name}: given, and trained on {learnt} masks, none of a test image." in err
    code, _, err = fewmask("evaluate", out, drawn, "--split", "all")
    assert code == 0, err
    assert f"{learnt} images were left out: the run has learnt from them" in err


def test_a_chain_does_not_mix_clocks(drawn, tmp_path, fewmask):
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *DISTILLING, "run.clock=cpu", "run.time=1m")
    assert code == 1
    assert "and a chain shares out wall time" in err


def test_an_encoder_is_no_teacher(taught, drawn, tmp_path, fewmask):
    teacher = taught / "pretrain" / "model.safetensors"
    words = ("data.root=" + str(drawn), f"run.out={tmp_path / 'out'}", f'distill.teachers=["{teacher}"]', *STUDENT)
    code, _, err = fewmask("distill", "tiny_unet", *words)
    assert code == 1
    assert "is an encoder, which gives no masks" in err


def test_a_file_of_other_tensors_is_no_teacher(drawn, tmp_path, fewmask):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    words = ("data.root=" + str(drawn), f"run.out={tmp_path / 'out'}", *STUDENT)
    code, _, err = fewmask("distill", "tiny_unet", *words, f'distill.teachers=["{tmp_path / "other.safetensors"}"]')
    assert code == 1
    assert "did not write" in err


def test_a_student_of_its_teachers_kind_may_start_from_the_whole_of_it(taught, drawn, tmp_path, fewmask):
    words = (
        "data.root=" + str(drawn), f'distill.teachers=["{taught / "finetune" / "model.safetensors"}"]', *STUDENT,
        "student.encoder=vit_micro_patch8", "student.segmenter=transunet", "student.weights=teacher",
        "distill.lr=1e-12", "distill.method.average=0.0",
    )  # fmt: skip
    code, _, err = fewmask("distill", "tiny_unet", *words, f"run.out={tmp_path / 'out'}")
    assert code == 0, err
    teacher, student = (load_file(run / "model.safetensors") for run in (taught / "finetune", tmp_path / "out/distill"))
    name = "encoder.body.blocks.0.attn.qkv.weight"
    np.testing.assert_allclose(student[name], teacher[name], atol=1e-6)
    np.testing.assert_allclose(student["head.weight"], teacher["head.weight"], atol=1e-6)


def test_a_selection_stands_for_the_runs_it_chose(tmp_path):
    names = {"rotation": "joint-rotation-0.1", "jigsaw": "pretrain-jigsaw"}
    for name in names.values():
        (tmp_path / "candidates" / name / "finetune").mkdir(parents=True)
        (tmp_path / "candidates" / name / "finetune" / "model.safetensors").touch()
    (tmp_path / "selection.json").write_text(json.dumps({"complete": True, "chosen": names, "candidates": []}))
    found = find_teachers(tmp_path)
    assert [path.parent.parent.name for path in found] == list(names.values())
    with pytest.raises(UserError, match="finish its fine-tuning"):
        find_teachers(tmp_path / "candidates")


def test_the_best_teacher_is_the_one_with_the_highest_validation_dice(tmp_path):
    def teachers(*scores):
        files = []
        for number, score in enumerate(scores):
            folder = tmp_path / f"{len(scores)}-{number}"
            folder.mkdir(exist_ok=True)
            if score is not None:
                (folder / "stage.json").write_text(json.dumps({"best_score": score}))
            files.append(folder / "model.safetensors")
        return files

    three = teachers(0.7, 0.9, 0.8)
    assert best_of(three) == three[1]
    assert best_of(three[::-1]) == three[1]
    unknown = teachers(0.7, None)
    assert best_of(unknown) == unknown[0]


def test_a_stage_asks_about_no_more_images_than_its_time_allows(tmp_path, monkeypatch):
    stage, others = Stage(Run(tmp_path, "distill", {}), "distill", budget=1000.0), list(range(100, 600))
    recipe = load_recipe("tiny_unet", ["run.seed=3"])
    answers = Answers(stage, recipe, None, [], [])
    monkeypatch.setattr(Answers, "_seconds_an_image", lambda self, indices: 1.0)
    chosen = answers.affordable(others)
    assert len(chosen) == 300
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(others)
    assert chosen != others[:300]
    # A resumed stage keeps its images, though the machine is faster now.
    monkeypatch.setattr(Answers, "_seconds_an_image", lambda self, indices: 0.001)
    assert answers.affordable(others) == chosen
    # Other features are another question.
    assert replace(answers, levels=(1,)).affordable(others) == others
    stage.budget = None
    assert answers.affordable(others) == others
    # From the first checkpoint on the images are those it began with, whatever time is given.
    (stage.folder / "checkpoints" / "step_1").mkdir(parents=True)
    for stage.budget in (20.0, None):
        assert answers.affordable(others) == others


def test_two_processes_ask_as_much_as_the_time_of_one_allows(taught, drawn, tmp_path):
    # Before the first Accelerator no process waited for another, and the second read what was not written yet.
    words = [
        *STUDENT, f"data.root={drawn}", f"run.out={tmp_path / 'small'}", f'distill.teachers=["{taught}"]',
        "distill.epochs=1000", "run.time=3s",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewmask", "distill"]
    command = [sys.executable, *launcher, "tiny_unet", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = facts(tmp_path / "small")
    assert (found["num_processes"], found["status"]) == (2, "done")
    assert json.loads((tmp_path / "small" / "distill" / "asked.json").read_text())["num_images"] > 0


def test_a_segmenter_that_was_pretrained_alone_may_teach_and_an_encoder_not(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "model.safetensors").touch()
    (tmp_path / "run.json").write_text('{"verb": "pretrain"}')
    (tmp_path / "pretrain" / "stage.json").write_text('{"product": "segmenter"}')
    assert find_teacher(tmp_path) == tmp_path / "pretrain" / "model.safetensors"
    (tmp_path / "pretrain" / "stage.json").write_text('{"product": "encoder"}')
    with pytest.raises(UserError, match="finish its fine-tuning first"):
        find_teacher(tmp_path)

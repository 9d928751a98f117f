"""The whole chain on drawn data, what it leaves, and what it does when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewmask as package
from fewmask.data.synthetic import make_dataset
from tests.commands.conftest import TINY, finish_chain, write_rows

ALWAYS_SAVE = ("pretrain.checkpoint_seconds=0", "finetune.checkpoint_seconds=0")


def table(path):
    """Return the rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, drawn):
    """One finished run, for the tests that only read it."""
    return finish_chain(tmp_path_factory, drawn, TINY)


def test_the_chain_leaves_a_model_a_report_and_figures(finished, drawn):
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = table(finished / "cases_test.csv")
    assert metrics["test"]["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    assert metrics["test"]["num_cases"] == len(rows) > 0
    assert "<html" in (finished / "report.html").read_text()
    photo = next((drawn / "images").iterdir())
    probability = package.load(finished / "model.onnx")(photo)
    assert probability.shape == np.asarray(Image.open(photo)).shape[:2]
    assert 0 <= probability.min() <= probability.max() <= 1


def test_the_exported_model_and_the_run_agree(finished, drawn):
    photo = next((drawn / "images").iterdir())
    difference = np.abs(package.load(finished / "model.onnx")(photo) - package.load(finished)(photo))
    assert difference.max() < 0.02


def test_no_test_image_is_trained_on_and_groups_stay_whole(finished):
    rows = table(finished / "cases.csv")
    uses = {(row["split"], row["use"]) for row in rows}
    assert uses <= {("train", "labelled"), ("val", "validation"), ("test", "excluded-test"), ("", "unlabelled")}
    splits = {}
    for row in rows:
        if row["split"]:
            splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_a_second_call_does_nothing_again(finished, drawn, fewmask):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    code, out, _ = fewmask("run", drawn, "--out", finished, *TINY)
    assert code == 0
    assert "test: Dice" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


@pytest.mark.usefixtures("unexported")
def test_poisoned_test_masks_change_no_weight(data, tmp_path, fewmask, finished):
    test = [row for row in table(finished / "cases.csv") if row["split"] == "test"]
    manifest = data / "manifest.csv"
    splits = {Path(r["image"]).name: r["split"] for r in table(finished / "cases.csv")}
    rows = table(manifest)
    write_rows(manifest, [{**row, "split": splits[Path(row["image"]).name]} for row in rows])
    assert fewmask("run", data, "--out", tmp_path / "clean", *TINY)[0] == 0
    for row in test:
        path = data / "masks" / Path(row["mask"]).name
        with Image.open(path) as mask:
            size = mask.size
        Image.fromarray(np.pad(np.full((2, 2), 255, np.uint8), ((0, size[1] - 2), (0, size[0] - 2)))).save(path)
    assert fewmask("run", data, "--out", tmp_path / "poisoned", *TINY)[0] == 0
    for stage in ("pretrain", "finetune"):
        weights = [(tmp_path / run / stage / "model.safetensors").read_bytes() for run in ("clean", "poisoned")]
        assert weights[0] == weights[1]
    truth = [
        [row["truth_fraction"] for row in table(tmp_path / run / "cases_test.csv")] for run in ("clean", "poisoned")
    ]
    assert truth[0] != truth[1]


@pytest.mark.usefixtures("unexported")
def test_thirty_images_and_three_masks_work(tmp_path, drawn, fewmask):
    data = tmp_path / "few"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        picture = rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((80, 64)).save(data / "images" / f"p{number:02d}.png")
        if number < 3:
            mask = np.zeros((64, 80), np.uint8)
            mask[10 : 30 + number, 20:50] = 255
            Image.fromarray(mask).save(data / "masks" / f"p{number:02d}.png")
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *TINY)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"]["num_cases"] == metrics["test"]["num_cases"] == 1


@pytest.mark.usefixtures("unexported")
def test_a_label_fraction_moves_the_rest_to_pretraining(data, tmp_path, fewmask):
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *TINY, "data.label_fraction=0.3")
    assert code == 0, err
    uses = [row["use"] for row in table(tmp_path / "run" / "cases.csv")]
    stages = [json.loads((tmp_path / "run" / s / "stage.json").read_text()) for s in ("pretrain", "finetune")]
    assert stages[1]["num_images"] == uses.count("labelled") < 5
    assert re.search(rf"check: {uses.count('labelled')} of \d+ training masks are used, by data\.label_fraction", err)
    assert stages[0]["num_images"] == uses.count("labelled") + uses.count("unlabelled")


@pytest.mark.usefixtures("unexported")
def test_a_copy_of_a_test_image_is_kept_out_of_pretraining(data, tmp_path, fewmask, finished):
    test = next(row for row in table(finished / "cases.csv") if row["split"] == "test")
    more = tmp_path / "more"
    more.mkdir()
    with Image.open(data / "images" / Path(test["image"]).name) as picture:
        picture.save(more / "copy.jpg", quality=60)
    code, _, err = fewmask("run", data, "--unlabelled", more, "--out", tmp_path / "run", *TINY)
    assert code == 0, err
    uses = {Path(r["image"]).name: r["use"] for r in table(tmp_path / "run" / "cases.csv")}
    assert uses["copy.jpg"] == "excluded-duplicate"
    facts = json.loads((tmp_path / "run" / "pretrain" / "stage.json").read_text())
    assert facts["excluded"]["near_duplicates"] >= 1


def start(command, out, cache):
    """Start the chain as a process of its own."""
    environment = {**os.environ, "FEWMASK_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, *command, "--out", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True,
    )  # fmt: skip


def wait_for(path_of, seconds=200):
    """Wait until `path_of()` is true."""
    for _ in range(seconds * 20):
        if path_of():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def weights(run):
    return [(run / stage / "model.safetensors").read_bytes() for stage in ("pretrain", "finetune")]


@pytest.mark.timeout(600)
def test_killed_in_each_stage_and_resumed_gives_the_same_weights(drawn, tmp_path):
    more = ["pretrain.min_epoch_steps=40", "finetune.min_epoch_steps=40", *ALWAYS_SAVE]
    command = ["-m", "fewmask", "run", str(drawn), *TINY, *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def kill_at(path_of, out):
        process = start(command, out, tmp_path / "cache")
        wait_for(path_of)
        process.kill()
        process.communicate()

    kill_at((whole / "finetune" / "stage.json").exists, whole)  # what follows is not looked at here, and takes long
    for stage in ("pretrain", "finetune"):
        kill_at(lambda stage=stage: list((killed / stage / "checkpoints").glob("step_*[1-9].safetensors")), killed)
        assert not (killed / stage / "stage.json").exists()
    kill_at((killed / "finetune" / "stage.json").exists, killed)
    assert '"kind": "resume"' in (killed / "finetune" / "log.jsonl").read_text()
    assert weights(killed) == weights(whole)


@pytest.mark.timeout(600)
def test_sigterm_exits_130_and_resumes(drawn, tmp_path):
    command = ["-m", "fewmask", "run", str(drawn), *TINY, "pretrain.epochs=3000"]
    out = tmp_path / "run"
    process = start(command, out, tmp_path / "cache")
    log = out / "pretrain" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    # Another time may be asked for when resuming; it ends what the epochs would not.
    process = start([*command, "run.time=1s"], out, tmp_path / "cache")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert '"kind": "resume"' in log.read_text()
    assert "pretrain: goes on from step " in err


@pytest.mark.timeout(600)
def test_two_processes_do_the_whole_chain_as_one(drawn, tmp_path):
    """Told of no device, as a user starts them: they find each other, and log and learn what one does."""
    settings = [*TINY, "run.device=auto", "run.precision=fp32"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, words in {"one": [], "two": launcher}.items():
        process = start([*words, "-m", "fewmask", "run", str(drawn), *settings], tmp_path / name, tmp_path / "cache")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for stage in ("pretrain", "finetune"):
        logs, facts = [], []
        for name in ("one", "two"):
            folder = tmp_path / name / stage
            facts.append(json.loads((folder / "stage.json").read_text())["num_processes"])
            lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            logs.append([line["loss"] for line in lines if line["kind"] == "step"])
        assert facts == [1, 2]
        assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    dice = [
        json.loads((tmp_path / name / "metrics.json").read_text())["test"]["dice"]["mean"] for name in ("one", "two")
    ]
    assert dice[1] == pytest.approx(dice[0], abs=1e-3)


@pytest.mark.usefixtures("unexported")
def test_mended_data_and_mended_settings_go_on_in_the_same_folder(data, tmp_path, fewmask):
    picture = sorted((data / "images").iterdir())[0]
    sound = picture.read_bytes()
    picture.write_bytes(b"")
    assert fewmask("run", data, "--out", tmp_path / "run", *TINY)[0] == 1
    picture.write_bytes(sound)
    assert fewmask("run", data, "--out", tmp_path / "run", *TINY, "pretrain.method.name=maee")[0] == 1
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *TINY)
    assert code == 0, err


@pytest.mark.usefixtures("unexported")
def test_a_labelled_copy_of_a_test_image_is_kept_out_of_pretraining(data, tmp_path, fewmask):
    rows = table(data / "manifest.csv")
    labelled = [row for row in rows if row["mask"]]
    for number, row in enumerate(labelled):
        row["split"], row["group"] = ("train", "val", "test")[number % 3], ""
    first, copied = labelled[0], labelled[2]
    with Image.open(data / copied["image"]) as picture:
        picture.save(data / first["image"], quality=70)
    write_rows(data / "manifest.csv", rows)
    assert fewmask("run", data, "--out", tmp_path / "run", *TINY)[0] == 0
    pre, fine = (json.loads((tmp_path / "run" / s / "stage.json").read_text()) for s in ("pretrain", "finetune"))
    uses = [row["use"] for row in table(tmp_path / "run" / "cases.csv")]
    assert pre["excluded"]["near_duplicates"] >= 1
    assert pre["num_images"] < uses.count("labelled") + uses.count("unlabelled")
    assert fine["num_images"] == uses.count("labelled")


def test_images_the_run_has_learnt_from_are_never_scored_as_unseen(finished, data, fewmask):
    code, out, err = fewmask("evaluate", finished, data, "--json")  # a copy of the run's data, elsewhere
    assert code == 0, err
    key, summary = next(iter(json.loads(out).items()))
    own = [row for row in table(finished / "cases.csv") if row["split"] == "test"]
    assert (key, summary["num_cases"]) == ("test", len(own))
    code, _, err = fewmask("evaluate", finished, data, "--split", "all")
    assert code == 1
    assert "would score images this run was trained on" in err


def test_unseen_data_are_scored_whole_without_the_images_learnt_from(finished, data, tmp_path, fewmask):
    other = make_dataset(tmp_path / "other", 5, 0, size=(64, 80), seed=9)
    trained = next(row for row in table(finished / "cases.csv") if row["use"] == "labelled")
    for kind in ("image", "mask"):
        source = data / f"{kind}s" / Path(trained[kind]).name
        shutil.copy(source, other / f"{kind}s" / f"planted{source.suffix}")
    (other / "manifest.csv").unlink()
    code, out, err = fewmask("evaluate", finished, other, "--json")
    assert code == 0, err
    assert "1 images were left out" in err
    key, summary = next(iter(json.loads(out).items()))
    assert (key, summary["num_cases"]) == ("other-all", 5)


def test_a_public_image_learnt_from_is_known_by_its_name_when_it_was_saved_anew(finished, data, tmp_path, fewmask):
    run, name = shutil.copytree(finished, tmp_path / "run"), "ISIC_0000001"
    rows = table(run / "cases.csv")
    trained = next(row for row in rows if row["use"] == "labelled")
    image, mask = data / "images" / Path(trained["image"]).name, data / "masks" / Path(trained["mask"]).name
    trained["image"] = f"elsewhere/{name}.png"
    write_rows(run / "cases.csv", rows)
    other = make_dataset(tmp_path / "other", 5, 0, size=(64, 80), seed=9)
    (other / "manifest.csv").unlink()
    Image.open(image).save(other / "images" / f"{name}_small.jpg", quality=50)
    shutil.copy(mask, other / "masks" / f"{name}_small.png")
    code, out, err = fewmask("evaluate", run, other, "--json")
    assert code == 0, err
    assert "1 images were left out" in err
    assert [summary["num_cases"] for summary in json.loads(out).values()] == [5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("finetune.method.dice_wieght=0.3",), "Unknown setting 'finetune.method.dice_wieght'"),
        (("finetune.method.name=segmnt",), "Did you mean 'segment'?"),
        (("finetune.method.average=2",), "average"),
        (("distill.epochs=0", "model.segmenter=nosuch"), "no segmenter named 'nosuch'"),
        (("pretrain.method.mask_ration=0.5",), "Unknown setting 'pretrain.method.mask_ration'"),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first_begins(words, said, drawn, tmp_path, fewmask):
    code, _, err = fewmask("run", drawn, "--out", tmp_path / "run", *TINY, *words)
    assert code == 1
    assert said in err
    assert not (tmp_path / "run").exists()


def test_two_data_sets_in_folders_of_one_name_keep_their_results_apart(finished, tmp_path, fewmask):
    run = shutil.copytree(finished, tmp_path / "run")
    for number, site in enumerate(("a", "b")):
        other = make_dataset(tmp_path / site / "set", 4 + number, 0, size=(64, 80), seed=20 + number)
        (other / "manifest.csv").unlink()
        for _ in range(2):  # again is not another
            assert fewmask("evaluate", run, other)[0] == 0
    metrics = json.loads((run / "metrics.json").read_text())
    sizes = {key: found["num_cases"] for key, found in metrics.items() if key.endswith("set-all")}
    assert sizes == {"set-all": 4, "b-set-all": 5}
    assert len(table(run / "cases_set-all.csv")) == 4


def test_a_run_that_does_not_say_what_it_learnt_from_is_not_scored(finished, drawn, tmp_path, fewmask):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "contents.json").unlink()
    code, _, err = fewmask("evaluate", run, drawn)
    assert code == 1
    assert "does not say which images it has learnt from" in err


@pytest.mark.usefixtures("unexported")
def test_two_runs_are_compared_on_the_same_images(finished, drawn, tmp_path, fewmask):
    assert fewmask("run", drawn, "--out", tmp_path / "run", *TINY, "run.seed=3", "finetune.min_epoch_steps=30")[0] == 0
    code, out, err = fewmask("evaluate", tmp_path / "run", drawn, "--against", finished, "--json")
    assert code == 0, err
    found = json.loads(out)["test"]
    means = [
        json.loads((run / "metrics.json").read_text())["test"]["dice"]["mean"] for run in (tmp_path / "run", finished)
    ]
    assert found["against"]["difference"] == pytest.approx(means[0] - means[1])
    code, _, err = fewmask("evaluate", tmp_path / "run", drawn, "--against", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in err
    code, _, err = fewmask("evaluate", tmp_path / "run", drawn, "--split", "tset")
    assert code == 1
    assert "There is no split 'tset'" in err

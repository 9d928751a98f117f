"""The whole chain on drawn data, what it leaves, and what it does when something is wrong."""

from __future__ import annotations

import csv
import json
import os
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
from tests.commands.conftest import TINY


def table(path):
    """Return the rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, drawn):
    """One finished run, for the tests that only read it."""
    out = tmp_path_factory.mktemp("run") / "run"
    environment = {**os.environ, "FEWMASK_CACHE": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "fewmask", "run", str(drawn), "--out", str(out), *TINY]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return out


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


def test_poisoned_test_masks_change_no_weight(data, tmp_path, fewmask, finished):
    test = [row for row in table(finished / "cases.csv") if row["split"] == "test"]
    manifest = data / "manifest.csv"
    splits = {Path(r["image"]).name: r["split"] for r in table(finished / "cases.csv")}
    rows = table(manifest)
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "split": splits[Path(row["image"]).name]})
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


def test_a_label_fraction_moves_the_rest_to_pretraining(data, tmp_path, fewmask):
    code, _, err = fewmask("run", data, "--out", tmp_path / "run", *TINY, "data.label_fraction=0.3")
    assert code == 0, err
    uses = [row["use"] for row in table(tmp_path / "run" / "cases.csv")]
    stages = [json.loads((tmp_path / "run" / s / "stage.json").read_text()) for s in ("pretrain", "finetune")]
    assert stages[1]["num_images"] == uses.count("labelled") < 5
    assert stages[0]["num_images"] == uses.count("labelled") + uses.count("unlabelled")


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


def test_sigterm_exits_130_and_resumes(drawn, tmp_path):
    environment = {**os.environ, "FEWMASK_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "run"
    settings = [*TINY, "pretrain.epochs=3000", "run.time=10m"]
    command = [sys.executable, "-m", "fewmask", "run", str(drawn), "--out", str(out), *settings]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True)
    log = out / "pretrain" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert list((out / "pretrain" / "checkpoints").glob("step_*"))


def test_evaluate_on_other_data_and_against_another_run(finished, data, fewmask):
    code, out, err = fewmask("evaluate", finished, data, "--split", "all", "--json")
    assert code == 0, err
    key, summary = next(iter(json.loads(out).items()))
    assert key.endswith("-all")
    assert summary["num_cases"] == 12
    shutil.rmtree(data)

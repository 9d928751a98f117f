"""Where a trained network is scored, and what is said of test images that are not new."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch

from fewmask.commands.evaluate import scoring_device


@pytest.mark.parametrize(
    ("asked", "present", "expected"),
    [
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("cuda", False, "cpu"),  # trained on a GPU, scored on a machine without one
        ("mps", False, "cpu"),
    ],
)
def test_a_network_is_scored_on_a_gpu_where_there_is_one_and_it_may_be(
    asked: str, present: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert scoring_device(asked) == expected


def test_test_images_that_a_pretraining_has_seen_are_told(drawn, tmp_path, fewmask):
    """As where first masks were drawn by a network that learnt from the whole folder: it had no split then."""
    data = shutil.copytree(drawn, tmp_path / "data")
    for hidden in ("masks", "manifest.csv"):
        (data / hidden).rename(tmp_path / hidden)
    small = (f"data.root={data}", "model.encoder=tiny", "model.size=32", "run.device=cpu")
    short = ("epochs=1", "batch_size=4", "min_epoch_steps=2")
    first, run = tmp_path / "first", tmp_path / "run"
    words = (*small, f"run.out={first}", "model.weights=none", "method.mask_patch=16")
    code, _, err = fewmask("pretrain", "simmim", *words, *(f"pretrain.{setting}" for setting in short))
    assert code == 0, err
    for hidden in ("masks", "manifest.csv"):
        (tmp_path / hidden).rename(data / hidden)
    code, _, err = fewmask("finetune", "unet", *small, f"run.out={first}")
    assert code == 1
    assert f"give 'finetune' an output folder of its own, and model.weights={first}" in err
    words = (*small, f"run.out={run}", f"model.weights={first}", "model.segmenter=tiny_unet")
    code, _, err = fewmask("finetune", "unet", *words, *(f"finetune.{setting}" for setting in short))
    assert code == 0, err
    with (run / "cases.csv").open(newline="") as file:
        seen = sum(row["use"] == "excluded-test" for row in csv.DictReader(file))
    assert f"none of a test image, but it saw {seen} of the test images without their masks" in err
    code, _, err = fewmask("evaluate", run, data)
    assert code == 0, err
    assert f"{seen} of the test images were seen before, without their masks" in err
    assert fewmask("report", run, "--out", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert f"{seen} of which it or its teacher saw before" in page
    assert "never used in training" not in page

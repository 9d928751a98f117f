"""The script that compares pre-trainings: cells that begin alike end alike, and a folder holds one comparison."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.continued_pretraining import SIZE, main, pooled, repeated
from fewmask.data.synthetic import make_dataset
from fewmask.engine.run import read_json
from fewmask.evaluate.score import read_case_csv
from fewmask.models import build_encoder, build_segmenter, save_model

GAINS = {"none": 0.0, "a": 0.1, "b": 0.3}


def save(path, weights):
    torch.manual_seed(0)
    encoder = build_encoder("efficientnet_lite0", weights, size=SIZE)
    save_model(path, encoder if weights == "packaged" else build_segmenter("unet", encoder), {})
    return path


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Return what runs the script on drawn pictures, one step a cell, and reads its table."""
    data = make_dataset(tmp_path / "data", 12, 0, (96, 96), fractions=(0.5, 0.2, 0.3))

    def run(*words, stops="1"):
        words = ("continued_pretraining", str(data), "--out", str(tmp_path / "runs"), *words)
        options = ("--script-steps", "1", "--script-stops", stops, "--seeds", "1", "--fractions", "1")
        monkeypatch.setattr(sys, "argv", [*words, *options])
        main()
        return read_json(tmp_path / "runs" / "table.json")

    return run


def test_what_begins_alike_ends_alike_and_a_folder_holds_one_comparison(compare, tmp_path):
    path = save(tmp_path / "again.safetensors", "packaged")
    found = compare("--weights", f"again:{path}")
    assert [cell["arm"] for cell in found["cells"]] == ["none", "again"]
    assert found["cells"][0]["dice"] == found["cells"][1]["dice"]
    same = found["differences"][0]
    assert (same["difference"], same["low"], same["high"], same["seeds"]) == (0, 0, 0, [0])
    other = compare("--weights", f"other:{save(tmp_path / 'other.safetensors', 'none')}")
    assert [cell["arm"] for cell in other["cells"]] == ["none", "again", "other"]
    assert other["cells"][:2] == found["cells"]
    assert other["differences"][1]["difference"] != 0
    assert str(tmp_path) not in str(other["arms"])  # what is published tells no folder
    with pytest.raises(SystemExit, match=r"begun otherwise \(protocol differ"):
        compare("--weights", f"again:{path}", "--protocol", "another")
    save(path, "none")
    with pytest.raises(SystemExit, match=r"begun otherwise \(again differ"):
        compare("--weights", f"again:{path}")
    assert read_json(tmp_path / "runs" / "table.json") == other
    rows = read_case_csv(tmp_path / "runs" / "none" / "1-0" / "cases_test.csv")
    better = {(name, 1.0): {0: [{**row, "dice": row["dice"] + more} for row in rows]} for name, more in GAINS.items()}
    assert repeated({"none": None, "a": ["figure"], "c": ["simmim"], "b": ["figure", "run.seed=1"]}) == [["a", "b"]]
    (together,) = pooled(["a", "b"], 1.0, better)
    assert together["difference"]["difference"] == pytest.approx(0.2)  # the mean of 0.1 and 0.3
    assert len(together["dice"]["per_seed"]) == 2
    assert pooled(["a", "c"], 1.0, {**better, ("c", 1.0): {}}) == []  # not all there yet


@pytest.mark.parametrize(
    ("words", "stops", "sentence"),
    [
        (["--arm", "none:figure"], "1", "Two arms are called none"),
        (["--weights", "arm:nowhere"], "1", "give a name, a colon and a file"),
        ([], "2", "of 1 steps every 20th is one"),
        (["--finetune", "finetune.epochs=3"], "1", "leave it or --script-steps out"),
    ],
)
def test_options_that_do_not_go_together_are_a_sentence(compare, tmp_path, words, stops, sentence):
    with pytest.raises(SystemExit, match=sentence):
        compare(*words, stops=stops)
    assert not (tmp_path / "runs").exists()

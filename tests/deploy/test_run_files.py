"""What deployment reads from a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fewmask
from fewmask.data.preprocess import predict_probability
from fewmask.deploy.run_files import describe_run, find_segmenter, input_size
from fewmask.models import build_encoder, build_segmenter, load_model, save_model
from fewmask.types import UserError


def make_run(folder: Path) -> Path:
    segmenter = build_segmenter("unet", build_encoder("efficientnet_lite0", size=32))
    save_model(folder / "finetune" / "model.safetensors", segmenter)
    record = {"config": {"model": {"weights": "packaged"}}, "data": {"fingerprint": "abc", "licence": "CC0"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps({"val": {"dice": 0.8}}))
    return folder


def test_the_distilled_segmenter_comes_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        find_segmenter(tmp_path / "missing")
    with pytest.raises(UserError, match="no segmenter yet"):
        find_segmenter(tmp_path)
    for stage in ("finetune", "distill"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "model.safetensors").touch()
        assert find_segmenter(tmp_path).parent.name == stage


@pytest.mark.parametrize(
    ("verb", "product", "told"),
    [
        ("pretrain", "segmenter", ""),
        ("pretrain", "encoder", "an encoder alone.*'fewmask finetune' and model.weights="),
        ("run", "segmenter", "no segmenter yet: finish 'fewmask run' first"),
    ],
)
def test_a_pretrained_segmenter_is_the_runs_only_where_nothing_else_was_wanted(
    tmp_path: Path, verb: str, product: str, told: str
) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "model.safetensors").touch()
    (tmp_path / "run.json").write_text(json.dumps({"verb": verb}))
    (tmp_path / "pretrain" / "stage.json").write_text(json.dumps({"product": product}))
    if not told:
        assert find_segmenter(tmp_path).parent.name == "pretrain"
        return
    with pytest.raises(UserError, match=told):
        find_segmenter(tmp_path)


def test_a_run_describes_itself_and_claims_nothing_it_does_not_know(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _, spec = load_model(find_segmenter(run))
    facts = describe_run(run, spec)
    assert facts["data_licence"] == "CC0"
    assert facts["weights_licence"] == "Apache-2.0"
    assert facts["data_fingerprint"] == "abc"
    assert facts["metrics"] == {"val": {"dice": 0.8}}
    assert facts["network"]["encoder"]["name"] == "efficientnet_lite0"
    first = facts["run_fingerprint"]
    (run / "run.json").write_text(json.dumps({"config": {"model": {"weights": "/home/somebody/other-run"}}}))
    (run / "metrics.json").unlink()
    facts = describe_run(run, spec)
    assert facts["weights"] == "other-run"
    assert "not recorded" in facts["weights_licence"]
    assert "not recorded" in facts["data_licence"]
    assert facts["metrics"] is None
    assert facts["run_fingerprint"] == first
    json.dumps(facts)


def test_no_licence_is_claimed_for_a_given_teachers_weights_nor_for_a_folder_called_as_a_word(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "finetune").rename(run / "distill")
    _, spec = load_model(find_segmenter(run))

    def told(**config: object) -> tuple[str, str]:
        (run / "run.json").write_text(json.dumps({"config": {"model": {"weights": "packaged"}, **config}}))
        facts = describe_run(run, spec)
        return facts["weights"], facts["weights_licence"]

    own_teacher = told(student={"weights": "teacher"}, distill={"teachers": []})
    assert own_teacher == ("packaged", "Apache-2.0")
    given = told(student={"weights": "teacher"}, distill={"teachers": ["RUN"]})
    assert given == ("teacher", "not recorded; ask the source")
    assert told(student={"weights": "runs/packaged"}) == ("packaged", "not recorded; ask the source")


def test_damaged_facts_are_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _, spec = load_model(find_segmenter(run))
    (run / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json cannot be read"):
        describe_run(run, spec)
    with pytest.raises(UserError, match="image size"):
        input_size({}, run)


def test_a_run_folder_predicts_as_its_network_does(tmp_path: Path) -> None:
    predictor = fewmask.load(make_run(tmp_path))
    segmenter, _ = load_model(find_segmenter(tmp_path))
    image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    assert np.array_equal(predictor(image), predict_probability(segmenter, image, 32))
    assert np.array_equal(predictor.mask(image), predictor(image) >= predictor.threshold)
    assert predictor.metadata["data_fingerprint"] == "abc"

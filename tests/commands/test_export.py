"""fewmask export on a run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fewmask
from fewmask.commands.export import export
from fewmask.data.cache import num_cores
from fewmask.deploy.latency import IMAGES, THREADS
from fewmask.models import build_encoder, build_segmenter, save_model
from fewmask.types import UserError


def test_a_run_becomes_one_file_that_predicts_as_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter("transunet", build_encoder("vit_tiny_patch16", size=32))
    save_model(tmp_path / "finetune" / "model.safetensors", segmenter)
    assert export(tmp_path, None, True) == 0
    facts = json.loads(capsys.readouterr().out)
    path = tmp_path / "model.onnx"
    assert json.loads((tmp_path / "export.json").read_text()) == facts  # for the report
    assert facts["megabytes"] == pytest.approx(path.stat().st_size / 1e6)
    assert facts["num_parameters"] == sum(p.numel() for p in segmenter.parameters())
    assert len(facts["latency"]) == (len(IMAGES) + 1) * sum(number <= num_cores() for number in THREADS)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in facts["latency"])
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    exported, trained = fewmask.load(path), fewmask.load(tmp_path)
    assert np.abs(exported(image) - trained(image)).max() <= 1e-3
    assert exported.metadata["run_fingerprint"] == trained.metadata["run_fingerprint"]


def test_what_a_reader_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter("tiny_unet", build_encoder("tiny", size=64))
    save_model(tmp_path / "finetune" / "model.safetensors", segmenter)
    assert export(tmp_path, tmp_path / "small.onnx", False) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "small.onnx").stat().st_size <= 500_000
    assert not (tmp_path / "export.json").exists()  # the report tells of the run's own file
    assert "0.097 M parameters, network input 64x64" in text
    assert "0.005 GMac at 64x64, 0.081 at 256x256" in text
    assert re.search(r"^64x64 network alone, 1 thread: p50 [\d.]+ ms, p95 [\d.]+ ms$", text, re.MULTILINE)
    assert re.search(r"^1024x768 photo, 1 thread: p50", text, re.MULTILINE)


def test_a_folder_without_a_segmenter_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no segmenter yet"):
        export(tmp_path, None, False)
    assert not list(tmp_path.iterdir())

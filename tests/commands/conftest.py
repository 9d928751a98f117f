"""A small drawn data set, and the command line called as a user calls it."""

from __future__ import annotations

import csv
import shutil
import sys

import pytest

from fewmask.__main__ import main
from fewmask.commands import chain
from fewmask.data.synthetic import make_dataset

_STAGES = (
    "model.size=32", "model.weights=none", "pretrain.epochs=1", "pretrain.min_epoch_steps=2", "pretrain.batch_size=4",
    "finetune.epochs=1", "finetune.min_epoch_steps=2", "finetune.batch_size=4", "run.device=cpu",
)  # fmt: skip
# The smallest chain that leaves a model: it is traced for ONNX in a few seconds.
TINY = (
    *_STAGES, "model.encoder=tiny", "model.segmenter=tiny_unet", "pretrain.method.name=simmim",
    "pretrain.method.mask_patch=16", "distill.epochs=0",
)  # fmt: skip
# A ViT with a CNN as student at its end.
DISTILLING = (
    *_STAGES, "model.encoder=vit_micro_patch8", "model.segmenter=transunet", "pretrain.method.name=mae",
    "student.encoder=tiny", "student.weights=none", "student.segmenter=tiny_unet",
    "distill.epochs=1", "distill.min_epoch_steps=2", "distill.batch_size=4",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep the tests out of the user's cache."""
    monkeypatch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Twelve images with masks and eight without, 64x80."""
    return make_dataset(tmp_path_factory.mktemp("drawn") / "data", 12, 8, size=(64, 80))


def read_rows(path):
    """Return a CSV's rows of text by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    """Write rows of text by column as a CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def finish_chain(tmp_path_factory, data, settings):
    """Run a chain with a cache of its own; return its folder."""
    out = tmp_path_factory.mktemp("chain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert call_main(patch, "run", data, "--out", out, *settings) == 0
    return out


def call_main(patch, *words):
    """Call the command line; return its exit code."""
    patch.setattr(sys, "argv", ["fewmask", *map(str, words)])
    try:
        main()
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


@pytest.fixture
def data(drawn, tmp_path):
    """A copy of the drawn data that a test may spoil."""
    return shutil.copytree(drawn, tmp_path / "data")


@pytest.fixture
def fewmask(monkeypatch, capsys):
    """Call the command line; returns (exit code, standard output, standard error)."""

    def call(*words):
        code = call_main(monkeypatch, *words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def unexported(monkeypatch):
    """Chains end without model.onnx, whose tracing takes longer than all else: for tests of what was learnt before."""
    monkeypatch.setattr(chain, "export_once", lambda folder, stage: None)

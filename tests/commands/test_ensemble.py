"""An ensemble's probability is the mean of its members', each at its own working size, and is scored as such."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewmask.commands.ensemble import EnsemblePredictor
from fewmask.commands.evaluate import score_into
from fewmask.data.manifest import load_cases
from fewmask.data.preprocess import predict_probability
from fewmask.evaluate.protocol import score_case
from fewmask.evaluate.results import read_case_csv
from fewmask.evaluate.score import read_case
from fewmask.models import build_encoder, build_segmenter, load_model, save_model
from fewmask.types import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three small segmenters that disagree, for pictures of 32 and 64 pixels."""
    folder, found = tmp_path_factory.mktemp("members"), []
    for seed, size in enumerate((32, 64, 32)):
        torch.manual_seed(seed)
        encoder = build_encoder("vit_tiny_patch16", size=size)
        segmenter = build_segmenter("transunet", encoder, decoder_channels=[16, 8, 8, 8])
        found.append(folder / f"{seed}.safetensors")
        save_model(found[-1], segmenter)
    return found


def mean_of_members(files, image):
    """Return the mean probability, member by member."""
    members = [load_model(file) for file in files]
    return np.mean([predict_probability(model, image, spec["size"]) for model, spec in members], axis=0)


def test_probability_is_the_mean_over_members_of_unequal_sizes(files):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    probability = EnsemblePredictor(files)(image)
    assert probability.dtype == np.float32
    np.testing.assert_allclose(probability, mean_of_members(files, image), atol=1e-6)
    assert np.abs(probability - EnsemblePredictor(files[:1])(image)).max() > 1e-3


def test_scores_are_those_of_the_mean(files, drawn, tmp_path):
    cases = [case for case in load_cases(drawn) if case.mask is not None][:4]
    summary = score_into(tmp_path, EnsemblePredictor(files), cases, "test")
    rows = read_case_csv(tmp_path / "cases_test.csv")
    for case, row in zip(cases, rows, strict=True):
        image, truth = read_case(case)
        assert row["dice"] == pytest.approx(score_case(case, mean_of_members(files, image), truth)["dice"])
    assert summary["dice"]["mean"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert (tmp_path / "metrics.json").exists()
    assert (tmp_path / "pictures" / "test" / "index.json").exists()


def test_an_ensemble_of_nothing_or_of_an_encoder_is_told(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        EnsemblePredictor([])
    save_model(tmp_path / "encoder.safetensors", build_encoder("vit_tiny_patch16", size=32))
    with pytest.raises(UserError, match="is an encoder"):
        EnsemblePredictor([tmp_path / "encoder.safetensors"])

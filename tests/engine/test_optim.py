"""The learning rate over the training, and what each group of parameters gets of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewmask.config import StageSection
from fewmask.engine.optim import build_optimiser, learning_rate, set_schedule, weight_decay
from fewmask.types import UserError
from tests.engine.tiny import TinyObjective


@given(st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_stays_between_its_ends_and_peaks_after_warm_up(progress, warmup, floor):
    settings = StageSection(method={"name": "x"}, lr=1.0, min_lr=floor, warmup=warmup)
    rate = learning_rate(progress, settings)
    assert 0 < rate <= 1.0 + 1e-9 or (floor == 0 and rate == pytest.approx(0, abs=1e-12))
    assert learning_rate(warmup, settings) == pytest.approx(1.0)
    assert learning_rate(1.0, settings) == pytest.approx(floor if warmup < 1 else 1.0)


def test_cosine_is_half_way_at_half_time():
    settings = StageSection(method={"name": "x"}, lr=2.0, min_lr=1.0, warmup=0.0)
    assert learning_rate(0.5, settings) == pytest.approx(1.5)
    assert learning_rate(0.25, settings) == pytest.approx(1 + 0.5 * (1 + math.cos(math.pi / 4)))


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group():
    objective = TinyObjective()
    optimiser = build_optimiser(objective, StageSection(method={"name": "x"}, weight_decay=0.1))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    listed = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in objective.parameters())


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_decay_moves_by_a_cosine_from_its_start_to_its_end(progress, start, end):
    settings = StageSection(method={"name": "x"}, weight_decay=start, weight_decay_end=end)
    share = (1 - math.cos(math.pi * progress)) / 2
    assert weight_decay(progress, settings) == pytest.approx((1 - share) * start + share * end)
    constant = StageSection(method={"name": "x"}, weight_decay=start)
    assert weight_decay(progress, constant) == pytest.approx(start)


@pytest.mark.parametrize("start", [0.0, 0.04])
def test_only_what_decays_follows_the_decay(start):
    objective = TinyObjective()
    settings = StageSection(method={"name": "x"}, weight_decay=start, weight_decay_end=0.4, lr=1.0, warmup=0.0)
    optimiser = build_optimiser(objective, settings)
    set_schedule(optimiser, 1.0, settings)
    for group in optimiser.param_groups:
        assert group["lr"] == pytest.approx(0.0)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.4 if parameter.ndim > 1 else 0.0)


def test_layer_decay_follows_depth():
    model = torch.nn.ModuleDict(
        {
            "encoder": torch.nn.ModuleDict(
                {"patch_embed": torch.nn.Linear(2, 2), "blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 3)}
            ),
            "head": torch.nn.Linear(2, 2),
        }
    )
    model["encoder"]["blocks"] = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    settings = StageSection(method={"name": "x"}, layer_decay=0.5, encoder_lr_scale=0.8)
    scales = {}
    for group in build_optimiser(model, settings).param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            scales[name] = group["lr_scale"]
    assert scales["head.weight"] == 1.0
    assert scales["encoder.blocks.2.weight"] == pytest.approx(0.8 * 0.5)
    assert scales["encoder.blocks.0.weight"] == pytest.approx(0.8 * 0.5**3)
    assert scales["encoder.patch_embed.weight"] == pytest.approx(0.8 * 0.5**4)


def test_layer_decay_without_blocks_is_refused():
    with pytest.raises(UserError, match="layer_decay needs an encoder made of blocks"):
        build_optimiser(TinyObjective(), StageSection(method={"name": "x"}, layer_decay=0.5))

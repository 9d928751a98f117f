"""A training that was stopped between two steps ends with the state it would have had."""

from __future__ import annotations

import pytest
import torch

from fewmask.engine.checkpoint import restore_newest, save_checkpoint
from fewmask.models import build_encoder
from fewmask.objective import Objective
from fewmask.pretrain.dino import DINO
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.tedmae import TEDMAE
from tests.pretrain.pictures import SIZE, SMALL, raw_batch

CASES = [
    (G2LL, "vit_tiny_patch16", {}),
    (G2LL, "resnet18", {}),
    (DINO, "vit_tiny_patch16", {"freeze_last": 0.3}),
    (TEDMAE, "vit_tiny_patch16", {}),
]


def begin(method, encoder: str, settings: dict, seed: int) -> tuple[Objective, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    subject = method(build_encoder(encoder, size=SIZE), **SMALL, **settings)
    return subject, torch.optim.AdamW([p for p in subject.parameters() if p.requires_grad], lr=1e-3)


def train(subject: Objective, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        loss = subject(subject.views()(raw_batch(seed=step)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        subject.before_step(step / 4)
        optimiser.step()
        subject.after_step(step / 4)


@pytest.mark.parametrize(("method", "encoder", "settings"), CASES)
def test_a_resumed_training_equals_an_uninterrupted_one(method, encoder, settings, tmp_path):
    whole, optimiser = begin(method, encoder, settings, seed=0)
    train(whole, optimiser, range(2))
    save_checkpoint(tmp_path, 2, whole, optimiser, {})
    train(whole, optimiser, range(2, 4))
    resumed, optimiser = begin(method, encoder, settings, seed=1)
    header, remarks = restore_newest(tmp_path, resumed, optimiser)
    assert (header["step"], remarks) == (2, [])
    train(resumed, optimiser, range(2, 4))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())

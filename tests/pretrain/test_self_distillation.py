"""Averages, centres, distributions and the projector, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewmask.models import build_encoder
from fewmask.pretrain.projector import Projector
from fewmask.pretrain.self_distillation import (
    Centre,
    Teacher,
    cross_entropy,
    ema_momentum,
    global_dim,
    global_tokens,
    sharpen,
)
from fewmask.types import UserError


def test_momentum_rises_from_its_start_to_one():
    assert ema_momentum(0.0, 0.996) == pytest.approx(0.996)
    assert ema_momentum(0.5, 0.996) == pytest.approx(0.998)
    assert ema_momentum(1.0, 0.996) == 1.0
    assert ema_momentum(0.25, 0.9) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_the_teacher_is_the_running_average_of_the_student():
    torch.manual_seed(0)
    student = {"encoder": nn.Linear(3, 2), "projector": nn.Linear(2, 2)}
    teacher = Teacher(student, 0.9)
    expected = {name: p.clone() for name, p in teacher.copies.named_parameters()}
    for progress in (0.0, 0.3, 0.8):
        with torch.no_grad():
            for module in student.values():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter))
        teacher.follow(student, progress)
        momentum = ema_momentum(progress, 0.9)
        current = {f"{key}.{name}": p for key, module in student.items() for name, p in module.named_parameters()}
        expected = {name: momentum * old + (1 - momentum) * current[name] for name, old in expected.items()}
        for name, parameter in teacher.copies.named_parameters():
            torch.testing.assert_close(parameter, expected[name])


def test_the_teacher_takes_no_gradient_and_its_batch_norms_use_the_batch():
    student = {"encoder": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))}
    teacher = Teacher(student, 0.99)
    assert not any(p.requires_grad for p in teacher.parameters())
    copy = teacher.copies["encoder"]
    assert copy[1].training
    assert not copy[2].training
    teacher.eval()
    assert not copy[1].training
    assert all(p.requires_grad for p in student["encoder"].parameters())


def test_the_centre_is_the_running_mean():
    centre, expected = Centre(3, momentum=0.9), torch.zeros(1, 3)
    for _ in range(3):
        scores = torch.randn(5, 3)
        centre.update(scores)
        expected = 0.9 * expected + 0.1 * scores.mean(0, keepdim=True)
    torch.testing.assert_close(centre.value, expected)


def test_targets_and_cross_entropy_equal_their_formulas():
    scores, centre, answers = torch.randn(4, 6), torch.randn(1, 6), torch.randn(4, 6)
    target = sharpen(scores, centre, 0.04)
    loss = cross_entropy(target, answers, 0.1)
    for row in range(4):
        powers = [math.exp((scores[row, k] - centre[0, k]).item() / 0.04) for k in range(6)]
        p = [x / sum(powers) for x in powers]
        assert target[row].tolist() == pytest.approx(p, rel=1e-3, abs=1e-6)
        total = math.log(sum(math.exp(answers[row, k].item() / 0.1) for k in range(6)))
        literal = -sum(p[k] * (answers[row, k].item() / 0.1 - total) for k in range(6))
        assert loss[row].item() == pytest.approx(literal, rel=1e-3)


def test_scores_are_cosines_to_prototypes_whatever_their_length():
    projector, feature = Projector(5, 7, hidden=16, bottleneck=4), torch.randn(3, 5)
    expected = torch.nn.functional.cosine_similarity(projector.mlp(feature)[:, None], projector.prototypes[None], dim=2)
    torch.testing.assert_close(projector(feature), expected)
    with torch.no_grad():
        projector.prototypes.mul_(3)
    torch.testing.assert_close(projector(feature), expected)


def test_the_last_layer_turns_as_that_of_dino_does():
    """Theirs is torch's Linear under weight_norm, its norms held at one: so long are the rows that Adam turns."""
    torch.manual_seed(0)
    projector = Projector(5, 300, hidden=16, bottleneck=64)
    linear = torch.nn.Linear(64, 300, bias=False)
    ours, began = (rows.detach().norm(dim=1) for rows in (projector.prototypes, linear.weight))
    assert ours.mean() == pytest.approx(float(began.mean()), rel=0.02)
    assert ours.std() == pytest.approx(float(began.std()), rel=0.2)
    theirs = torch.nn.utils.parametrizations.weight_norm(linear)
    norms, directions = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    with torch.no_grad():
        norms.fill_(1)
        directions.copy_(projector.prototypes)
    feature = torch.randn(8, 5)
    for scores in (projector(feature), theirs(projector.embed(feature))):
        torch.nn.functional.cross_entropy(scores, torch.arange(8)).backward()
    torch.testing.assert_close(projector.prototypes.grad, directions.grad)


def test_the_last_layer_waits_for_its_time_and_then_steps_no_further_than_from_a_start():
    """DINO's code takes the gradient away; one of zero would let AdamW shrink the layer, and leap when one comes."""
    torch.manual_seed(0)
    projector, feature = Projector(5, 7, hidden=16, bottleneck=4, freeze_last=0.1), torch.randn(3, 5)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    began = projector.prototypes.detach().clone()

    def step(progress: float) -> None:
        optimiser.zero_grad()
        projector(feature)[:, 0].sum().backward()
        projector.before_step(progress)
        optimiser.step()

    hidden = projector.mlp[0].weight.detach().clone()
    for _ in range(200):
        step(0.05)
    assert torch.equal(projector.prototypes, began)
    assert not torch.equal(projector.mlp[0].weight, hidden)
    assert projector.prototypes not in optimiser.state
    step(0.1)
    moved = (projector.prototypes.detach() - began * (1 - 1e-3 * 0.1)).abs()
    assert moved[0].max() > 5e-4
    assert moved.max() < 1.001e-3  # Adam's first step is one of the rate, not the several of a late one


def test_a_checkpoint_of_a_version_that_kept_a_gate_is_read():
    projector = Projector(5, 7, hidden=16, bottleneck=4)
    older = {"teacher.gate": torch.tensor(1.0)} | {f"teacher.{k}": v + 1 for k, v in projector.state_dict().items()}
    whole = torch.nn.ModuleDict({"teacher": projector})
    whole.load_state_dict(older)
    assert torch.equal(projector.prototypes, older["teacher.prototypes"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "resnet18"])
def test_the_first_token_is_the_global_feature(name):
    encoder, image = build_encoder(name, size=32).eval(), torch.randn(2, 3, 32, 32)
    tokens = global_tokens(encoder, image)
    coarsest = encoder(image)[-1]
    assert tokens.shape == (2, 1 + coarsest[0, 0].numel(), global_dim(encoder))
    torch.testing.assert_close(tokens[:, 1:], coarsest.flatten(2).transpose(1, 2))
    if encoder.kind == "cnn":
        torch.testing.assert_close(tokens[:, 0], coarsest.mean((2, 3)))


def test_bad_settings_are_told():
    with pytest.raises(UserError, match=r"'momentum' cannot be 1\.5"):
        Teacher({}, 1.5)
    with pytest.raises(UserError, match="'centre_momentum' cannot be 1"):
        Centre(3, 1)
    with pytest.raises(UserError, match="at least 2 prototypes"):
        Projector(4, 1)
    with pytest.raises(UserError, match="'freeze_last' cannot be 1"):
        Projector(4, 8, freeze_last=1)

"""Signs of collapse in closed form, the guard's patience, and statistics over processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch import multiprocessing as mp

from fewmask.pretrain.collapse import CollapseGuard, entropies, feature_std
from fewmask.pretrain.self_distillation import Centre
from fewmask.processes import mean_over_processes
from fewmask.types import UserError
from tests.engine.processes import Pictures, objective_of
from tests.engine.processes import train as train_method
from tests.engine.tiny import TinyObjective, train


def test_feature_std_in_closed_form():
    direction = torch.randn(1, 8)
    scales = torch.tensor([[1.0], [2.0], [5.0]])
    assert feature_std(direction * scales).item() == pytest.approx(0, abs=1e-6)  # lengths do not matter
    assert feature_std(torch.cat([direction, -direction])).item() == pytest.approx(1)
    assert feature_std(torch.eye(4)).item() == pytest.approx(math.sqrt(3 / 4))


def test_entropies_in_closed_form():
    uniform = torch.full((6, 8), 1 / 8)
    torch.testing.assert_close(torch.stack(entropies(uniform)), torch.tensor([1.0, 0.0]))
    one = torch.eye(8)[[3] * 6]
    torch.testing.assert_close(torch.stack(entropies(one)), torch.tensor([0.0, 0.0]))
    apart = torch.eye(8)[:6]
    torch.testing.assert_close(torch.stack(entropies(apart)), torch.tensor([0.0, 1.0]))
    halves = torch.eye(8)[[0, 0, 0, 1, 1, 1]]
    torch.testing.assert_close(entropies(halves)[1].item(), math.log(2) / math.log(6))


FEATURES = {True: torch.ones(4, 3), False: torch.eye(4)}
TARGETS = {True: torch.full((4, 4), 0.25), False: torch.eye(4)}


def run(guard: CollapseGuard, signs: list[tuple[bool, bool]], progress: float = 0.5) -> None:
    for same_features, same_targets in signs:
        guard(FEATURES[same_features], TARGETS[same_targets])
        guard.after_step(progress)


@pytest.mark.parametrize(
    ("signs", "sentence"),
    [
        ([(True, False)] * 5, r"features differ by less than 0.01 .* for 5 steps .*; raise the batch\."),
        ([(False, True)] * 5, r"targets tell images apart by less than 0.001"),
    ],
)
def test_the_guard_stops_after_its_patience(signs, sentence):
    with pytest.raises(UserError, match=sentence):
        run(CollapseGuard("raise the batch", patience=5), signs)
    run(CollapseGuard("", patience=5), signs[:-1])


class Guarded(TinyObjective):
    """Its features are the same for all images from a step on."""

    def __init__(self, collapses_at: int) -> None:
        super().__init__()
        self.guard, self.step, self.collapses_at = CollapseGuard("", patience=500), 0, collapses_at

    def forward(self, batch):
        self.guard(FEATURES[self.step >= self.collapses_at])
        return super().forward(batch)

    def after_step(self, progress):
        self.step += 1
        self.guard.after_step(progress)


@pytest.mark.parametrize(("collapses_at", "stops_at"), [(0, 90), (60, 130)])
def test_a_training_of_few_steps_is_stopped_too(collapses_at, stops_at, tmp_path):
    made = []

    def objective():
        made.append(Guarded(collapses_at))
        return made[-1]

    with pytest.raises(UserError, match="collapsed"):
        train(tmp_path, epochs=50, every=1e9, objective=objective)  # 150 steps, 60 of them are too many
    assert made[0].step == stops_at


@pytest.mark.parametrize("method", ["dino", "g2ll", "tedmae"])
def test_every_method_with_a_teacher_is_stopped_by_its_guard(method, tmp_path):
    objective = objective_of(method, drop_path=0, collapse_patience=5)
    embedding = objective.product().body.patch_embed
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.zero_()
    embedding.requires_grad_(False)  # whatever the image is, the tokens are the same
    stream = Pictures()
    with pytest.raises(UserError, match=r"collapsed: its features differ by less than .* steps in a row"):
        train_method(tmp_path, objective, stream, epochs=20)
    assert len(stream.asked) < 60


def test_a_slow_start_of_a_resumed_training_does_not_shorten_the_patience():
    guard = CollapseGuard("", patience=500)
    guard.low_std.fill_(100)
    progress = [0.5, 0.6, *(0.6 + 1e-5 * step for step in range(1, 300))]  # the first step took a tenth of the time
    for value in progress:
        guard(FEATURES[True])
        guard.after_step(value)
    assert guard.low_std.item() == 401


def test_a_short_collapse_of_a_short_training_is_forgiven(tmp_path):
    _, facts, objective = train(tmp_path, epochs=50, every=1e9, objective=lambda: Guarded(100))
    assert facts["steps"] == 150
    assert objective.guard.low_std.item() == 50  # it was seen


def test_a_healthy_step_starts_the_count_anew():
    guard = CollapseGuard("", patience=5)
    run(guard, ([(True, True)] * 4 + [(False, False)]) * 3)
    assert (guard.low_std.item(), guard.low_information.item()) == (0, 0)
    run(guard, [(True, True)] * 4)
    assert (guard.low_std.item(), guard.low_information.item()) == (4, 4)


def test_the_guard_is_quiet_in_the_grace_period_in_eval_mode_and_when_switched_off():
    bad = [(True, True)] * 9
    guard = CollapseGuard("", patience=5)
    run(guard, bad, progress=0.1)
    assert (guard.low_std.item(), guard.low_information.item()) == (0, 0)
    run(CollapseGuard("", patience=5).eval(), bad)
    run(CollapseGuard("", patience=0), bad)


def test_the_count_survives_a_resume():
    first, second = CollapseGuard("", patience=5), CollapseGuard("", patience=5)
    run(first, [(True, False)] * 4)
    second.load_state_dict(first.state_dict())
    second(FEATURES[True])
    assert second.low_std.item() == 5


def test_bad_patience_is_told():
    with pytest.raises(UserError, match="'collapse_patience' cannot be -1"):
        CollapseGuard("", patience=-1)


def features_and_scores() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 6, generator=generator)


def statistics(features: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    centre = Centre(6)
    centre.update(scores)
    values = [feature_std(features), *entropies(scores.softmax(1))]
    return torch.cat([torch.stack(values), centre.value[0], mean_over_processes(features.mean(0))])


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    features, scores = features_and_scores()
    half = slice(rank * 4, rank * 4 + 4)
    torch.save(statistics(features[half], scores[half]), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    expected = statistics(*features_and_scores())
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)

"""Teachers: frozen for good, in no checkpoint, at their own size, and several as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewmask.distill.teacher import EnsembleTeacher, FrozenTeacher, merge
from fewmask.types import SegOutput, UserError
from tests.distill.networks import SIZE, segmenter


class Sized(nn.Module):
    """A segmenter that tells the size it was made for, and takes no other."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 2, 3, padding=1)
        self.encoder.size = size
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, image: torch.Tensor) -> SegOutput:
        assert image.shape[2:] == (self.encoder.size, self.encoder.size)
        features = self.encoder(image)
        return SegOutput(self.head(features), [features])


def picture(num: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(4))


def test_a_teacher_neither_learns_nor_leaves_eval_mode():
    network = segmenter(4)
    teacher = FrozenTeacher(network)
    nn.ModuleDict({"outer": teacher}).train()
    output = teacher(picture().requires_grad_())
    assert not any(module.training for module in [teacher, *network.modules()])
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not output.logits.requires_grad
    assert not any(feature.requires_grad for feature in output.features)
    assert network.levels[0][1].num_batches_tracked == 0


def test_a_teacher_that_another_has_set_to_training_comes_back():
    network = segmenter(4)
    teacher = FrozenTeacher(network)
    network.train()
    teacher.train()
    assert not network.training


def test_a_teacher_leaves_nothing_in_the_state():
    outer = nn.ModuleDict({"one": FrozenTeacher(segmenter(4)), "more": EnsembleTeacher([segmenter(4), segmenter(5)])})
    assert len(outer.state_dict()) == len(list(outer.parameters())) == len(list(outer.buffers())) == 0
    outer.load_state_dict({})


def test_a_teacher_moves_with_its_owner():
    networks = [segmenter(4), segmenter(5)]
    outer = nn.Sequential(EnsembleTeacher(networks)).to(torch.float64)
    assert all(p.dtype == torch.float64 for network in networks for p in network.parameters())
    assert all(b.dtype == torch.float64 for n in networks for b in n.buffers() if b.is_floating_point())
    assert outer[0](picture().double()).features[0].dtype == torch.float64
    outer.to(memory_format=torch.channels_last)
    assert networks[0].levels[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_copied_teacher_answers_alike():
    teacher = FrozenTeacher(segmenter(4))
    assert torch.equal(copy.deepcopy(teacher)(picture()).logits, teacher(picture()).logits)


def test_a_teacher_answers_as_its_segmenter_does():
    network = segmenter(4).eval()
    output, expected = FrozenTeacher(network)(picture()), network(picture())
    assert torch.equal(output.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(output.features, expected.features, strict=True))


@pytest.mark.parametrize("size", [8, 32])
def test_a_teacher_of_another_size_sees_its_own(size):
    network = Sized(size).eval()
    output = FrozenTeacher(network)(picture())
    shown = F.interpolate(picture(), (size, size), mode="bilinear", antialias=True)
    expected = network(shown)
    torch.testing.assert_close(output.logits, F.interpolate(expected.logits, (SIZE, SIZE), mode="bilinear"))
    torch.testing.assert_close(output.features[0], expected.features[0])


def test_an_ensemble_answers_with_the_mean_probability():
    networks = [segmenter(4, seed) for seed in range(3)]
    ensemble = EnsembleTeacher(networks)
    output = ensemble(picture())
    logits = [network.eval()(picture()).logits for network in networks]
    torch.testing.assert_close(output.logits.sigmoid(), torch.stack(logits).sigmoid().mean(0))
    assert all(torch.equal(a, b) for a, b in zip(ensemble.members_logits(picture()), logits, strict=True))
    assert torch.equal(output.features[2], networks[0](picture()).features[2])


def test_certain_members_stay_finite():
    def says(logit: float) -> SegOutput:
        return SegOutput(torch.full((1, 1, 2, 2), logit), [])

    torch.testing.assert_close(merge([says(300.0), says(300.0)]).logits, torch.full((1, 1, 2, 2), 300.0))
    torch.testing.assert_close(merge([says(300.0), says(-300.0)]).logits, torch.zeros(1, 1, 2, 2))
    # The mean of p = 1 and p = 1/2 is 3/4.
    torch.testing.assert_close(merge([says(300.0), says(0.0)]).logits, torch.full((1, 1, 2, 2), 3.0).log())


def test_without_a_teacher_there_is_nothing_to_learn():
    with pytest.raises(UserError, match="needs a teacher"):
        EnsembleTeacher([])

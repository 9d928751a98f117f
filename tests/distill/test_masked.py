"""MGD, MBF and M2BF: what they drop, and their losses from the equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fewmask.distill.m2bf import M2BF
from fewmask.distill.mbf import MBF
from fewmask.distill.mgd import MGD
from fewmask.types import UserError
from tests.distill.networks import SIZE, STUDENT, TEACHER, batch_of, blobs, identity_align, random_output
from tests.distill.test_bands import reference

NUM = 3
LEVEL = 1  # stride 2, 3 channels; the student's has stride 2 too, and 6 channels
SHAPE = (NUM, 1, SIZE // 2, SIZE // 2)


def band_of(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """The band at half the size: any of 2 x 2 pixels is in it."""
    found = np.stack([reference(y.bool().numpy(), radius)[0] for y in mask[:, 0]])
    halves = [found[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]
    return torch.tensor(np.any(halves, axis=0))[:, None]


def aligned(distiller, student) -> torch.Tensor:
    project = distiller.align.aligns[0].project
    return torch.einsum("oc,bchw->bohw", project.weight[:, :, 0, 0], student.features[1]) + project.bias.view(-1, 1, 1)


def generated(block, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """G(M x): what is dropped is zero in every channel."""
    kept = x * (1 - dropped.float())
    hidden = F.conv2d(kept, block[0].weight, block[0].bias, padding=1).clamp(min=0)
    return F.conv2d(hidden, block[2].weight, block[2].bias, padding=1)


def mean_square(target: torch.Tensor, guess: torch.Tensor) -> float:
    return (((target - guess) ** 2).sum() / target.numel()).item()


def draws(num: int) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.rand(SHAPE) for _ in range(num)]


def loss_of(distiller, student, teacher, mask) -> float:
    torch.manual_seed(5)
    return distiller(student, teacher, batch_of(mask)).item()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return random_output(STUDENT, 1), random_output(TEACHER, 2)


def test_mgd_generates_from_what_a_mask_anywhere_left(pair):
    distiller = MGD(STUDENT, TEACHER, 0.6, levels=(LEVEL,))
    guess = generated(distiller.generations[0], aligned(distiller, pair[0]), draws(1)[0] < 0.6)
    expected = mean_square(pair[1].features[LEVEL], guess)
    assert loss_of(distiller, *pair, None) == pytest.approx(expected, rel=1e-5)


def test_mbf_generates_from_what_a_mask_in_the_band_left(pair):
    distiller, mask = MBF(STUDENT, TEACHER, width=0.125, drop=0.7, levels=(LEVEL,)), blobs()
    dropped = (draws(1)[0] < 0.7) & band_of(mask, 2)
    assert 0 < dropped.sum() < band_of(mask, 2).sum() < dropped.numel()
    expected = mean_square(
        pair[1].features[LEVEL], generated(distiller.generations[0], aligned(distiller, pair[0]), dropped)
    )
    assert loss_of(distiller, *pair, mask) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["cascade", "parallel"])
def test_m2bf_masks_afresh_at_every_head_and_adds_the_losses(pair, form):
    distiller = M2BF(STUDENT, TEACHER, 3, form, width=0.125, drop=0.7, levels=(LEVEL,))
    mask, target = blobs(), pair[1].features[LEVEL]
    first = aligned(distiller, pair[0])
    x, expected = first, 0.0
    for block, draw in zip(distiller.heads[0], draws(3), strict=True):
        x = generated(block, x if form == "cascade" else first, (draw < 0.7) & band_of(mask, 2))
        expected += mean_square(target, x)
    assert loss_of(distiller, *pair, mask) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["cascade", "parallel"])
def test_m2bf_with_one_head_is_mbf(pair, form):
    one, other = MBF(STUDENT, TEACHER), M2BF(STUDENT, TEACHER, 1, form)
    other.load_state_dict({k.replace("generations.0", "heads.0.0"): v for k, v in one.state_dict().items()})
    assert loss_of(one, *pair, blobs()) == loss_of(other, *pair, blobs())


def test_without_masking_all_controls_are_one(pair):
    def loss(**options):
        torch.manual_seed(1)
        return loss_of(MBF(STUDENT, TEACHER, **options), *pair, blobs())

    assert loss(region="none") == loss(drop=0.0) == loss(region="whole", drop=0.0) != loss()


def test_an_image_without_a_boundary_is_imitated_whole(pair):
    empty = torch.zeros(NUM, 1, SIZE, SIZE)
    torch.manual_seed(1)
    banded = MBF(STUDENT, TEACHER)
    torch.manual_seed(1)
    plain = MBF(STUDENT, TEACHER, region="none")
    assert loss_of(banded, *pair, empty) == loss_of(plain, *pair, empty)


def test_a_perfect_student_loses_only_what_is_dropped():
    """With align and G the identity (features above zero pass the ReLU), the error is that of the dropped positions."""
    output = random_output(TEACHER, 1)
    output.features[LEVEL].abs_()
    distiller, mask = MBF(TEACHER, TEACHER, width=0.125, drop=1.0, levels=(LEVEL,)), blobs()
    identity_align(distiller)
    with torch.no_grad():
        for i in (0, 2):
            torch.nn.init.dirac_(distiller.generations[0][i].weight)
            distiller.generations[0][i].bias.zero_()
    expected = (output.features[LEVEL].square() * band_of(mask, 2)).mean().item()
    assert loss_of(distiller, output, output, mask) == pytest.approx(expected, rel=1e-5)


def test_no_student_position_that_is_dropped_gets_a_gradient():
    student, teacher = random_output(STUDENT, 1), random_output(TEACHER, 2)
    student.features[1].requires_grad_()
    mask = blobs()
    MBF(STUDENT, TEACHER, width=0.125, drop=1.0, levels=(LEVEL,))(student, teacher, batch_of(mask)).backward()
    seen = student.features[1].grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(seen, ~band_of(mask, 2))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [(MGD, {"drop": 1.5}, "drop"), (MBF, {"drop": 1.5}, "drop"), (MBF, {"width": 0.0}, "width"),
     (M2BF, {"num_heads": 0}, "num_heads"), (M2BF, {"width": -1.0}, "width")],
)  # fmt: skip
def test_impossible_settings_are_the_users_mistake(factory, options, message):
    with pytest.raises(UserError, match=message):
        factory(STUDENT, TEACHER, **options)


def test_the_band_needs_a_mask(pair):
    with pytest.raises(UserError, match="give every image a mask"):
        MBF(STUDENT, TEACHER)(*pair, batch_of(None))

"""Labels, predictions in their place, and how far those are trusted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.distill.supervision import agreement, supervise, weighted_mean
from fewmask.losses import cross_entropy_dice, loss_of_each
from tests.distill.networks import SIZE, STUDENT, batch_of, blobs, random_output


def teacher_logits() -> torch.Tensor:
    return random_output(STUDENT, 3).logits


def test_a_missing_mask_is_filled_whatever_its_place_holds():
    mask = blobs()
    mask[1] = torch.nan
    has_mask = torch.tensor([True, False, True])
    found = supervise(batch_of(mask, has_mask=has_mask), teacher_logits())
    assert torch.equal(found.labelled, has_mask)
    assert torch.equal(found.mask[[0, 2]], mask[[0, 2]])
    assert torch.equal(found.mask[1], teacher_logits()[1].sigmoid())
    assert torch.equal(found.decided[1], (teacher_logits()[1] >= 0).float())
    assert torch.equal(found.decided[0], mask[0])
    assert found.confidence[[0, 2]].tolist() == [1, 1]
    assert found.confidence[1] == agreement(teacher_logits().sigmoid())[1] < 1


@pytest.mark.parametrize(
    ("mask", "extra", "expected"),
    [(True, {}, [True] * 3), (False, {}, [False] * 3), (False, {"has_mask": torch.ones(3).bool()}, [False] * 3)],
)
def test_which_images_have_a_label(mask, extra, expected):
    found = supervise(batch_of(blobs() if mask else None, **extra), teacher_logits())
    assert found.labelled.tolist() == expected


def test_agreement_is_the_soft_dice_of_a_prediction_with_its_decision():
    p = torch.tensor([[0.9, 0.6, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([2 * 1.5 / (2.0 + 2), 0.5, 1.0, 1.0])
    torch.testing.assert_close(agreement(p.view(4, 1, 2, 2)), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 100))
def test_agreement_is_a_share(seed, scale):
    value = agreement((random_output(STUDENT, seed).logits * scale).sigmoid())
    assert ((value >= 0) & (value <= 1 + 1e-6)).all()


@pytest.mark.parametrize("dice_weight", [0.0, 0.5, 1.0])
def test_the_loss_of_each_image_is_the_shared_loss_on_that_image(dice_weight):
    logits, target = teacher_logits().requires_grad_(), blobs()
    each = loss_of_each(logits, target, dice_weight)
    expected = torch.stack(
        [cross_entropy_dice(logits[i : i + 1], target[i : i + 1], dice_weight)["loss"] for i in range(3)]
    )
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(each.mean(), cross_entropy_dice(logits, target, dice_weight)["loss"])
    torch.testing.assert_close(
        torch.autograd.grad(each.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of_each(logits, target, dice_weight), each)


def test_weighted_means_take_the_chosen_alone():
    each, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.25])
    assert weighted_mean(each, weight, torch.tensor([True, False, True])) == (1 + 1) / 2
    assert weighted_mean(each, weight, torch.tensor([False, True, False])) == 1
    assert weighted_mean(each, weight, torch.zeros(3).bool()) == 0


def test_the_filled_mask_is_at_the_size_of_the_image():
    assert supervise(batch_of(None), teacher_logits()).mask.shape == (3, 1, SIZE, SIZE)

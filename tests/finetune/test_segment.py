"""The parts of Segment: its loss, its averaged weights, its settings and its preview."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewmask.finetune.segment import Segment, draw_outline
from fewmask.types import Batch, SegOutput, UserError

from .test_contract import SIZE, TinySegmenter, make, raw_batch, train


class Constant(nn.Module):
    """A segmenter that returns one learnt logit everywhere, and has no encoder."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, image: torch.Tensor) -> SegOutput:
        return SegOutput(self.logit.expand(len(image), 1, *image.shape[2:]), [])


@pytest.mark.parametrize("dice_weight", [0.0, 0.3, 1.0])
def test_the_loss_mixes_cross_entropy_and_dice(dice_weight):
    # Half the pixels are foreground and every probability is p.
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    p = torch.tensor(0.7)
    out = Segment(Constant(float(p.logit())), size=8, dice_weight=dice_weight)(
        Batch(torch.zeros(2, 3, 8, 8), ["a", "b"], mask)
    )
    cross_entropy = -(p.log() + (1 - p).log()) / 2
    dice = 1 - (2 * 32 * p + 1) / (64 * p + 32 + 1)
    torch.testing.assert_close(out["cross_entropy"], cross_entropy)
    torch.testing.assert_close(out["dice_loss"], dice)
    torch.testing.assert_close(out["loss"], (1 - dice_weight) * cross_entropy + dice_weight * dice)


def test_the_averaged_copy_takes_batchnorm_statistics_and_no_gradient():
    objective = make("segment", average=0.9)
    train(objective, 4)
    mine, averaged = objective.segmenter.encoder[1], objective.product().encoder[1]
    assert mine.running_mean.abs().sum() > 0
    assert torch.equal(averaged.running_mean, mine.running_mean)
    assert torch.equal(averaged.running_var, mine.running_var)
    assert averaged.num_batches_tracked == 4
    assert not torch.equal(averaged.weight, mine.weight)
    assert all(not p.requires_grad and p.grad is None for p in objective.product().parameters())
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in TinySegmenter().parameters())


def test_the_averaged_copy_stays_in_eval_mode():
    objective = make("segment", average=0.9)
    objective.train()
    assert objective.segmenter.encoder[1].training
    assert not any(module.training for module in objective.product().modules())


@pytest.mark.parametrize(("settings", "message"), [
    ({"average": 1.0}, "average"), ({"average": -0.1}, "average"), ({"dice_weight": 1.5}, "dice_weight"),
])  # fmt: skip
def test_impossible_settings_are_the_users_mistake(settings, message):
    with pytest.raises(UserError, match=message):
        Segment(TinySegmenter(), size=SIZE, **settings)


def test_a_segmenter_without_an_encoder_cannot_be_frozen():
    with pytest.raises(UserError, match="no encoder"):
        Segment(Constant(0.0), size=SIZE, freeze_encoder=True)


@pytest.mark.parametrize("augment", ["full", "flips", "xray", "none"])
def test_the_views_give_pictures_of_the_size_asked_for(augment):
    batch = raw_batch()
    torch.manual_seed(0)
    first = make("segment", augment=augment).views()(batch)
    again = make("segment", augment=augment).views()(batch)
    assert first.image.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(first.image, again.image) == (augment == "none" or torch.equal(first.mask, again.mask))


def test_xray_views_keep_gray_pictures_gray_and_upright():
    ramp = torch.linspace(0, 255, 32).to(torch.uint8).view(1, 1, 32, 1).expand(16, 3, 32, 32)
    batch = Batch(ramp, [""] * 16, torch.zeros(16, 1, 32, 32, dtype=torch.uint8))
    seen = make("segment", augment="xray").preview(
        make("segment", augment="xray").views()(Batch(batch.image, batch.names))
    )
    picture = seen["augmented"]
    torch.testing.assert_close(picture[:, 0], picture[:, 1], atol=1e-3, rtol=0)
    assert (picture[:, 0, -4:].mean((1, 2)) > picture[:, 0, :4].mean((1, 2)) + 0.2).all()


def test_the_outline_is_the_inner_border_of_the_mask():
    picture, mask = torch.zeros(1, 3, 9, 9), torch.zeros(1, 1, 9, 9)
    mask[..., 2:7, 3:8] = 1
    expected = mask - F.pad(torch.ones(1, 1, 3, 3), (4, 2, 3, 3))
    drawn = draw_outline(picture, mask)
    assert torch.equal((drawn.sum(1, keepdim=True) > 0).float(), expected)
    assert torch.equal(draw_outline(picture, torch.ones(1, 1, 9, 9)), picture)
    assert torch.equal(draw_outline(picture, torch.zeros(1, 1, 9, 9)), picture)

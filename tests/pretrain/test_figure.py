"""Figure and ground: what moves with the picture, what is learnt, and what is not learnt from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewmask.data.augment import PretrainViews
from fewmask.losses import cross_entropy_dice, loss_of_each
from fewmask.models import build_encoder, build_segmenter
from fewmask.pretrain.figure import LOOK_EVERY, Figure, FigureViews
from fewmask.pretrain.figure_rule import FigureRule
from fewmask.types import Batch, UserError
from tests.engine.tiny import BATCH, TinyStream, train
from tests.pretrain.pictures import EMPTY, SIDE, disc, painted


def made(**settings) -> Figure:
    torch.manual_seed(0)
    return Figure(build_segmenter("unet", build_encoder("efficientnet_lite0", size=64)), size=64, **settings)


def test_the_figure_moves_with_its_picture():
    image = torch.cat([painted(disc((40 + i, 52 - i), 18 + i)) for i in range(8)])
    views = FigureViews(PretrainViews(64, (0.4, 1.0)), FigureRule())
    torch.manual_seed(0)
    batch = views(Batch(image, [str(i) for i in range(8)]))
    assert batch.mask is None
    assert batch.extra["told"].tolist() == [1.0] * 8
    red = batch.image[:, :1]
    middle = (red.amax((2, 3), keepdim=True) + red.amin((2, 3), keepdim=True)) / 2
    seen = (red < middle).float()
    assert (seen - batch.extra["figure"]).abs().mean() < 0.04
    shares = seen.mean((1, 2, 3))
    assert shares.max() > 1.3 * shares.min()  # they were cropped, not only resized


def test_a_picture_without_a_figure_teaches_nothing():
    subject = made().eval()
    image = torch.cat([painted(disc()), painted(EMPTY)])
    batch = subject.views()(Batch(image, ["a", "b"]))
    assert batch.extra["told"].tolist() == [1.0, 0.0]
    terms = subject(batch)
    other = replace(batch, image=torch.stack([batch.image[0], torch.randn_like(batch.image[1])]))
    torch.testing.assert_close(subject(other)["loss"], terms["loss"])
    alone = replace(batch, image=batch.image[:1], extra={k: v[:1] for k, v in batch.extra.items()})
    torch.testing.assert_close(2 * terms["loss"], subject(alone)["loss"])
    logits = subject.segmenter(alone.image).logits
    torch.testing.assert_close(subject(alone)["loss"], cross_entropy_dice(logits, alone.extra["figure"])["loss"])
    assert terms["told"] == 0.5


def test_a_mask_is_never_read():
    subject = made().eval()
    losses = []
    for mask in (None, torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)):
        torch.manual_seed(1)
        losses.append(subject(subject.views()(Batch(painted(disc()), ["a"], mask=mask)))["loss"])
    assert torch.equal(*losses)


def test_it_learns_where_the_figures_are():
    subject = made()
    torch.manual_seed(0)
    image = torch.cat([painted(disc((36 + 8 * (i % 4), 60 - 8 * (i % 3)), 16 + i)) for i in range(8)])
    batch = subject.views()(Batch(image, [str(i) for i in range(8)]))
    optimiser = torch.optim.AdamW(subject.parameters(), lr=2e-3)
    for _ in range(25):
        loss = subject(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    share = batch.extra["figure"].mean((1, 2, 3))
    guess = loss_of_each(torch.logit(share).view(-1, 1, 1, 1).expand(-1, 1, 64, 64), batch.extra["figure"])
    assert loss < 0.5 * guess.mean()  # of who knows only how large they are


def small_batch(subject, picture):
    """Return views of a picture, cut for speed."""
    batch = subject.views()(Batch(painted(picture).expand(2, -1, -1, -1), ["a", "b"]))
    cut = batch.extra | {"figure": batch.extra["figure"][..., :32, :32]}
    return replace(batch, image=batch.image[..., :32, :32], extra=cut)


def steps(subject, batch, number):
    for _ in range(number):
        subject(batch)
        subject.after_step(0.1)


def test_pictures_without_figures_stop_the_training_with_a_sentence():
    subject = made()
    steps(subject, small_batch(subject, disc()), LOOK_EVERY)
    subject = made()
    batch = small_batch(subject, EMPTY)
    steps(subject, batch, LOOK_EVERY - 1)
    with pytest.raises(UserError, match=r"of 100 steps, 0% have one thing.*such as 'simmim'.*another output folder"):
        steps(subject, batch, 1)


class Pictures(TinyStream):
    """The same picture at every step."""

    def __init__(self, picture):
        super().__init__()
        self.picture = painted(picture).expand(BATCH, -1, -1, -1)

    def batch(self, step, rank=0, world=1):
        return replace(super().batch(step, rank, world), image=self.picture)


def test_a_training_of_few_steps_is_judged_at_its_end(tmp_path):
    train(tmp_path / "figure", stream=Pictures(disc()), epochs=1, objective=made)
    for _ in range(2):  # and again when it is asked to go on
        with pytest.raises(UserError, match="of 3 steps, 0% have one thing"):
            train(tmp_path / "none", stream=Pictures(EMPTY), epochs=1, objective=made)


def test_a_resumed_training_counts_on():
    subject, resumed = made(), made()
    batch = small_batch(subject, EMPTY)
    steps(subject, batch, LOOK_EVERY - 3)
    resumed.load_state_dict(subject.state_dict())
    steps(resumed, batch, 2)
    with pytest.raises(UserError, match="of 100 steps"):
        steps(resumed, batch, 1)
    found = made()
    steps(found, small_batch(found, disc()), 2)
    resumed.load_state_dict(found.state_dict())
    steps(resumed, batch, 1)
    resumed.at_end()  # two of three


@pytest.mark.parametrize(
    "settings", [{"min_area": -0.1}, {"max_border": 1.5}, {"dice_weight": 2}, {"min_explained": 1.1}]
)
def test_shares_outside_their_range_are_a_sentence(settings):
    with pytest.raises(UserError, match=r"cannot be .*: give a share between 0 and 1"):
        made(**settings)

"""Figure and ground: what is found, what moves with the picture, and what is not learnt from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fewmask.data.augment import PretrainViews
from fewmask.losses import cross_entropy_dice, loss_of_each
from fewmask.models import build_encoder, build_segmenter
from fewmask.pretrain.figure import (
    CELLS,
    LOOK_EVERY,
    Figure,
    FigureRule,
    FigureViews,
    connected,
    find_figure,
    lowered,
    lowering,
    split_by_otsu,
    without_hairs,
    without_shading,
)
from fewmask.types import Batch, UserError
from tests.engine.tiny import BATCH, TinyStream, train

SIDE = 96
RULE = FigureRule(min_area=0.01, max_border=0.25, min_explained=0.6)  # as Figure takes it
COLOUR = st.tuples(*[st.integers(0, 255)] * 3)


def disc(middle=(48, 48), radius=24.0) -> torch.Tensor:
    """Return where a disc of pixels is: bool (SIDE, SIDE)."""
    place = torch.arange(SIDE) + 0.5
    return (place[:, None] - middle[0]).square() + (place - middle[1]).square() < radius**2


def painted(inside: torch.Tensor, figure=(90, 40, 30), ground=(220, 180, 170)) -> torch.Tensor:
    """Return pictures uint8 (1, 3, SIDE, SIDE) of two colours."""
    colours = torch.tensor([ground, figure], dtype=torch.uint8)
    return colours[inside.long()].permute(2, 0, 1)[None]


def made(**settings) -> Figure:
    torch.manual_seed(0)
    return Figure(build_segmenter("unet", build_encoder("efficientnet_lite0", size=64)), size=64, **settings)


@given(st.lists(st.integers(0, 63), min_size=2, max_size=40))
def test_a_threshold_divides_as_no_other_does_better(values):
    row = np.array([0, *values, 63], float)  # so that a bin is a value

    def between(above: np.ndarray) -> float:
        if above.all() or not above.any():
            return 0.0
        return above.mean() * (1 - above.mean()) * (row[above].mean() - row[~above].mean()) ** 2

    above, explained = split_by_otsu(torch.tensor(row[None], dtype=torch.float32))
    found = above[0].numpy()
    assert row[found].min() > row[~found].max()
    assert between(found) == pytest.approx(max(between(row > t) for t in range(63)), rel=1e-4)
    assert explained.item() == pytest.approx(between(found) / row.var(), rel=1e-4)
    assert explained.item() <= 1 + 1e-6


def test_a_row_of_one_value_has_none_above_and_nothing_explained():
    above, explained = split_by_otsu(torch.full((1, 9), 7.0))
    assert not above.any()
    assert explained.item() == 0


def test_the_threshold_is_lowered_to_a_share_of_the_way_between_the_means():
    values = torch.tensor([[0.0, 1.0, 2.0, 3.9, 4.1, 9.0, 10.0, 11.0], [5.0] * 8])
    above, part = values > 8, torch.tensor([0.35, 0.35])
    # Means 2.2 and 10.0: 0.35 of the way is 4.93, 0.2 of it 3.76; then a row where nothing is above.
    assert torch.equal(lowered(values, above, part), values > 8)
    assert lowered(values, above, torch.tensor([0.2, 0.2]))[0].tolist() == [False] * 3 + [True] * 5
    above[0, 4] = True  # means 1.725 and 8.525: 4.105
    assert lowered(values, above, part)[0].tolist() == [False] * 5 + [True] * 3
    above[0, 3] = True  # means 1 and 7.6: 3.31
    assert lowered(values, above, part)[0].tolist() == [False] * 3 + [True] * 5
    assert not lowered(values, above, part)[1].any()


def test_it_is_lowered_more_the_larger_the_figure():
    """0.45 up to an area of 0.03, 0.1 from 0.3 on, and halfway between at their geometric mean."""
    areas = torch.tensor([0.0, 0.01, 0.03, (0.03 * 0.3) ** 0.5, 0.3, 0.9])
    torch.testing.assert_close(lowering(areas), torch.tensor([0.45, 0.45, 0.45, 0.275, 0.1, 0.1]))


@pytest.mark.parametrize(("radius", "least", "most"), [(10, 0.9, 1.6), (20, 0.95, 1.4), (40, 0.95, 1.15)])
def test_a_soft_disc_is_told_about_its_own_size_small_or_large(radius, least, most):
    """Its rim is as wide at any size, as a camera leaves it; the share is of the area within half of the contrast."""
    line = torch.arange(SIDE) - (SIDE - 1) / 2
    distance = (line[:, None].square() + line.square()).sqrt()
    depth = torch.sigmoid((radius - distance) / 2)
    image = (200 - 120 * depth).byte().expand(1, 3, -1, -1)
    found, told = find_figure(image, RULE)
    assert told
    assert least <= float(found.float().mean() / (distance <= radius).float().mean()) <= most


@given(st.integers(0, 2**31), st.floats(0.3, 0.8), st.integers(2, 14))
def test_what_is_connected_to_the_heaviest_cell_is_what_a_walk_finds(seed, density, side):
    random = np.random.default_rng(seed)
    inside, weight = random.random((side, side)) < density, random.random((side, side)) + 0.1
    found = connected(torch.tensor(inside)[None, None], torch.tensor(weight, dtype=torch.float32))[0, 0].numpy()
    if not inside.any():
        assert not found.any()
        return
    reached = {tuple(np.argwhere(inside)[weight[inside].argmax()])}
    for _ in range(side):
        around = {(y + j, x + i) for y, x in reached for j in (-1, 0, 1) for i in (-1, 0, 1)}
        reached |= {(y, x) for y, x in around if 0 <= y < side and 0 <= x < side and inside[y, x]}
    assert set(map(tuple, np.argwhere(found))) == reached


@given(st.tuples(st.integers(40, 56), st.integers(40, 56)), st.integers(12, 30), COLOUR, COLOUR)
def test_a_disc_of_any_colour_is_found_where_it_is(middle, radius, figure, ground):
    distance = np.abs(np.subtract(figure, ground)).max()
    inside = disc(middle, radius)
    found, told = find_figure(painted(inside, figure, ground), RULE)
    if distance == 0:
        assert not told
        return
    cover = F.adaptive_avg_pool2d(inside[None, None].float(), CELLS)
    assert told
    assert found[-F.max_pool2d(-cover, 3, 1, 1) == 1].all()  # but for a cell at its rim
    assert not found[F.max_pool2d(cover, 3, 1, 1) == 0].any()


def test_mirrored_and_negative_pictures_have_the_same_figures():
    torch.manual_seed(0)
    fields = [F.interpolate(torch.rand(4, 3, n, n), (SIDE, SIDE), mode="bicubic") for n in (6, 24)]
    image = (torch.cat(fields).clamp(0, 1) * 255).byte()
    image[:2, :, disc()] //= 8
    found, told = find_figure(image, RULE)
    assert 0 < told.sum() < 8
    mirrored, still_told = find_figure(image.flip(3), RULE)
    assert (mirrored.flip(3) == found).float().mean() > 0.99
    assert torch.equal(told, still_told)
    negative, told_too = find_figure(255 - image[:4], RULE)  # those without thin things
    assert (negative == found[:4]).float().mean() > 0.98
    assert torch.equal(told[:4], told_too)


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        (torch.zeros(SIDE, SIDE, dtype=torch.bool), "one colour"),
        (disc((46.5, 46.5), 3), "too small"),
        (torch.arange(SIDE).expand(SIDE, SIDE) < 50, "half of the border is in it"),
    ],
)
def test_where_no_one_thing_stands_out_nothing_is_told(inside, why):
    _, told = find_figure(painted(inside), RULE)
    assert not told, why
    if inside.any():
        assert find_figure(painted(inside), FigureRule(0.0, 1.0, 0.0))[1]


def test_a_second_thing_beside_the_figure_is_none_of_it():
    inside, other = disc((48, 48), 16), disc((48, 84), 6)
    found, told = find_figure(painted(inside | other), RULE)
    assert told
    assert torch.equal(found, find_figure(painted(inside), RULE)[0])


@pytest.mark.parametrize("gap", [6, 12, 20])
def test_of_two_things_as_near_to_the_middle_one_is_the_figure(gap):
    one, other = disc((48, 48 - 9 - gap), 9), disc((48, 48 + 9 + gap), 9)
    found, told = find_figure(painted(one | other), RULE)
    assert told
    halves = found[..., : CELLS // 2].any(), found[..., CELLS // 2 :].any()
    assert sum(map(bool, halves)) == 1


@given(st.integers(0, 2**31), st.integers(2, 90), st.integers(2, 90))
def test_hairs_are_painted_over_by_a_closing(seed, height, width):
    torch.manual_seed(seed)
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    side = 2 * round((max(height, width) / 29 - 1) / 2) + 1
    wide = F.max_pool2d(image.float(), side, 1, side // 2)
    assert torch.equal(without_hairs(image).float(), -F.max_pool2d(-wide, side, 1, side // 2))


def test_dark_hairs_across_a_figure_do_not_make_it_another():
    inside, hairs = disc((48, 48), 20), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for start in range(4, SIDE, 12):
        hairs[:, start : start + 2] = hairs[start : start + 2] = True
    image = painted(inside)
    with_hairs = torch.where(hairs, torch.tensor([20, 15, 10], dtype=torch.uint8).view(1, 3, 1, 1), image)
    (found, told), (plain, _) = find_figure(with_hairs, RULE), find_figure(image, RULE)
    assert told
    assert 2 * (found & plain).sum() / (found.sum() + plain.sum()) > 0.95  # but for a cell at its rim


def shaded(image: torch.Tensor, slope: float, fall: float) -> torch.Tensor:
    """Return pictures lit unevenly: `slope` grey levels less from left to right, `fall` less in the corners."""
    line = torch.linspace(-1, 1, SIDE)
    light = slope * (line + 1) / 2 + fall * (line.square() + line[:, None].square()) / 2
    return (image.float() - light).clamp(0, 255).byte()


@pytest.mark.parametrize(("slope", "fall"), [(60, 0), (0, 80), (40, 60), (-60, 40)])
def test_an_unevenly_lit_picture_has_the_figure_of_an_evenly_lit_one(slope, fall):
    """The light takes more than the figure's own contrast, which is 40."""
    image = painted(disc((44, 50), 12), (160, 150, 140), (200, 190, 180))
    (found, told), (plain, _) = find_figure(shaded(image, slope, fall), RULE), find_figure(image, RULE)
    assert told
    assert 2 * (found & plain).sum() / (found.sum() + plain.sum()) > 0.9


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 255))
def test_nothing_but_light_leaves_nothing(across, down, fall, level):
    place = torch.linspace(-0.5, 0.5, CELLS)
    x, y = place.expand(CELLS, CELLS), place[:, None].expand(CELLS, CELLS)
    light = level + 100 * (across * x + down * y + fall * (x.square() + y.square()))
    left = without_shading(light.expand(2, 3, -1, -1))
    assert left.abs().max() < 0.02


def test_a_sticker_at_the_border_does_not_make_the_skin_a_figure():
    """A third of the border is of a colour that pulls its mean, and not its median."""
    inside, sticker = disc((44, 40), 9), disc((48, 110), 45)
    image = painted(inside)
    image[..., sticker] = torch.tensor([30, 200, 210], dtype=torch.uint8)[:, None]
    found, told = find_figure(image, RULE)
    assert told
    cover = F.interpolate(found.float(), (SIDE, SIDE), mode="bilinear")[0, 0] >= 0.5
    assert 2 * (cover & inside).sum() / (cover.sum() + inside.sum()) > 0.85


def test_many_pictures_are_looked_at_as_each_alone():
    image = torch.cat([painted(disc((36 + i % 20, 50), 12 + i % 9) if i % 3 else EMPTY) for i in range(40)])
    rows = [*range(0, 40, 2), *range(1, 40, 2)]
    figures, told = made().look(image.permute(0, 2, 3, 1).numpy(), rows)
    assert torch.equal(figures, find_figure(image[rows], RULE)[0])
    assert told.sum() == 26
    assert made().share_told(image.permute(0, 2, 3, 1).numpy(), rows) == pytest.approx(26 / 40)


def test_a_threshold_that_explains_little_tells_nothing():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, SIDE, SIDE), dtype=np.uint8))
    anything = FigureRule(0.0, 1.0, 0.0)
    assert find_figure(noise, anything)[1]
    assert not find_figure(noise, anything._replace(min_explained=0.8))[1]
    assert find_figure(painted(disc()), anything._replace(min_explained=0.8))[1]


def test_the_figure_moves_with_its_picture():
    image = torch.cat([painted(disc((40 + i, 52 - i), 18 + i)) for i in range(8)])
    views = FigureViews(PretrainViews(64, (0.4, 1.0)), RULE)
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
    image = torch.cat([painted(disc()), painted(torch.zeros(SIDE, SIDE, dtype=torch.bool))])
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


EMPTY = torch.zeros(SIDE, SIDE, dtype=torch.bool)


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

"""Figure and ground: what the rule finds in a picture, and where it finds nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from fewmask.pretrain.figure import Figure
from fewmask.pretrain.figure_rule import (
    CELLS,
    FigureRule,
    connected,
    find_figure,
    lowered,
    lowering,
    split_by_otsu,
    without_hairs,
    without_shading,
)
from tests.pretrain.pictures import EMPTY, SIDE, disc, painted

RULE = FigureRule()
COLOUR = st.tuples(*[st.integers(0, 255)] * 3)


def dice(found: torch.Tensor, inside: torch.Tensor) -> float:
    """Return how well a figure of cells agrees with pixels."""
    cover = F.interpolate(found.float(), inside.shape, mode="bilinear")[0, 0] >= 0.5
    return float(2 * (cover & inside).sum() / (cover.sum() + inside.sum()))


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
    distance = np.linalg.norm(np.subtract(figure, ground))
    assume(not 4 <= distance < 5)  # grey levels: the mean of the middle is a little less than the disc's
    inside = disc(middle, radius)
    found, told = find_figure(painted(inside, figure, ground), RULE)
    if distance < 4:
        assert not told
        return
    cover = F.adaptive_avg_pool2d(inside[None, None].float(), CELLS)
    assert told
    assert found[-F.max_pool2d(-cover, 3, 1, 1) == 1].all()  # but for a cell at its rim
    assert not found[F.max_pool2d(cover, 3, 1, 1) == 0].any()


def test_mirrored_and_negative_pictures_have_the_same_figures():
    torch.manual_seed(0)
    fields = [F.interpolate(torch.rand(4, 3, n, n), (SIDE, SIDE), mode="bicubic") for n in (6, 24)]
    image = (torch.cat(fields).clamp(0, 1) * 100 + 120).byte()
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
        (EMPTY, "one colour"),
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
    left, bend = without_shading(light.expand(2, 3, -1, -1))
    assert left.abs().max() < 0.02
    # In the middle of a side the square is a quarter; of three colours alike the distance is root three of one's.
    assert bend.tolist() == pytest.approx([25 * abs(fall) * 3**0.5] * 2, abs=0.02)


@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_a_narrow_dark_frame_is_no_light_that_makes_a_figure(width):
    """Its light would be so steep that the picture's middle stood out."""
    for inside in (disc(radius=20), EMPTY):
        image = painted(inside)
        frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
        frame[width:-width, width:-width] = False
        image[..., frame] = 0
        found, told = find_figure(image, RULE)
        assert not told or (inside.any() and dice(found, inside) > 0.85)


def test_the_dark_corners_of_a_round_field_are_no_light():
    """They are a fifth of the border's cells, and would bend the light if it were first fitted to all of them alike."""
    inside = disc(radius=20)
    image = painted(inside)
    image[..., ~disc(radius=0.55 * SIDE)] = 0
    found, told = find_figure(image, RULE)
    assert told
    assert dice(found, inside) > 0.85


def test_of_a_wide_frame_the_window_is_the_figure():
    """A limit of the rule, which takes the border's colour for the ground's; the README tells of it."""
    image = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    window = slice(12, -12)
    image[..., window, window] = painted(disc(radius=12))[..., window, window]
    found, told = find_figure(image, RULE)
    assert told
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[window, window] = True
    assert dice(found, inside) > 0.9


def blushed(image: torch.Tensor, levels: float) -> torch.Tensor:
    """Return pictures that are redder about the middle."""
    place = torch.linspace(-0.5, 0.5, SIDE)
    blush = levels * torch.exp(-(place[:, None].square() + place.square()) / (2 * 0.1**2))
    return (image - torch.stack([blush * 0, blush, blush])).clamp(0, 255).byte()


def with_stickers():
    """Two stickers, unlike and at opposite sides, pull the border's mean by more than the disc differs."""
    inside = disc((44, 52), 12)
    image = painted(inside, (170, 130, 120), (200, 170, 160))
    image[..., :30, :14] = torch.tensor([30, 200, 210], dtype=torch.uint8).view(1, 3, 1, 1)
    image[..., 50:, -14:] = torch.tensor([30, 60, 220], dtype=torch.uint8).view(1, 3, 1, 1)
    return image, inside


def with_dark_corner():
    """A corner differs four times as much as the disc."""
    inside = disc((50, 52), 14)
    image = painted(inside, (160, 125, 115), (200, 170, 160))
    image[..., disc((0, 0), 18)] = torch.tensor([20, 15, 10], dtype=torch.uint8)[:, None]
    return image, inside


def off_a_blush():
    """The disc lies beside the middle, which is redder than the border, and is bluish itself."""
    inside = disc((48, 72), 11)
    return blushed(painted(inside, (120, 110, 150), (200, 170, 160)), 30), inside


def in_noise():
    """The noise of a pixel is twice what the disc differs by."""
    torch.manual_seed(1)
    inside = disc((46, 50), 16)
    image = painted(inside, (170, 130, 120), (200, 160, 150)).float()
    return (image + 60 * torch.randn(image.shape)).clamp(0, 255).byte(), inside


def among_others():
    """A small disc among larger ones, all as soft as a camera leaves them."""
    line = torch.arange(SIDE) + 0.5
    depth = torch.zeros(SIDE, SIDE)
    for place, radius in (((48, 48), 9), ((20, 20), 10), ((20, 76), 10)):
        distance = ((line[:, None] - place[0]).square() + (line - place[1]).square()).sqrt()
        depth += 120 * torch.sigmoid((radius - distance) / 2)
    return (200 - depth.clamp(max=120)).byte().expand(1, 3, -1, -1), disc((48, 48), 9)


@pytest.mark.parametrize(
    ("scene", "least"),
    [(with_stickers, 0.85), (with_dark_corner, 0.95), (off_a_blush, 0.85), (in_noise, 0.8), (among_others, 0.8)],
)
def test_what_else_is_in_a_picture_does_not_make_the_figure_another(scene, least):
    """Each scene is lost without one part of the rule.

    These are the border's median, what is far being fainter, the middle weighed by how much it differs, the mean of
    three by three cells, and the lowering by what is connected to the middle.
    """
    image, inside = scene()
    found, told = find_figure(image, RULE)
    assert told
    assert dice(found, inside) > least


def test_a_sticker_over_a_third_of_the_border_is_neither_light_nor_figure():
    inside, sticker = disc((44, 40), 9), disc((48, 110), 45)
    image = painted(inside)
    image[..., sticker] = torch.tensor([30, 200, 210], dtype=torch.uint8)[:, None]
    found, told = find_figure(image, RULE)
    assert told
    assert dice(found, inside) > 0.85


def textured(number: int) -> torch.Tensor:
    """Return pictures of random colours, coarse and fine."""
    torch.manual_seed(0)
    fields = [(3, 1.0), (8, 0.6), (40, 0.15)]
    layers = [F.interpolate(torch.rand(number, 3, n, n), (SIDE, SIDE), mode="bicubic") * share for n, share in fields]
    return (sum(layers) / 1.75).clamp(0, 1).mul(255).byte()


def test_many_pictures_are_looked_at_as_each_alone():
    """But for a cell where float32 adds in another order."""
    scenes = [scene()[0] for scene in (with_stickers, with_dark_corner, off_a_blush, in_noise, among_others)]
    image = torch.cat([*scenes, textured(34), painted(EMPTY)])
    rows = [*range(0, 40, 2), *range(1, 40, 2)]
    subject = Figure(torch.nn.Identity(), size=64)
    figures, told = subject.look(image.permute(0, 2, 3, 1).numpy(), rows)
    stricter = RULE._replace(min_explained=0.75)
    for (found, seen), rule in (((figures, told), RULE), (find_figure(image[rows], stricter), stricter)):
        alone = [find_figure(image[row : row + 1], rule) for row in rows]
        assert torch.equal(seen, torch.cat([one for _, one in alone]))
        assert (found != torch.cat([figure for figure, _ in alone]))[seen].sum() <= 2
        assert 1 < seen.sum() < 35
    assert subject.share_told(image.permute(0, 2, 3, 1).numpy(), rows) == pytest.approx(float(told.float().mean()))


def test_a_threshold_that_explains_little_tells_nothing():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, SIDE, SIDE), dtype=np.uint8))
    anything = FigureRule(0.0, 1.0, 0.0)
    assert find_figure(noise, anything)[1]
    assert not find_figure(noise, anything._replace(min_explained=0.8))[1]
    assert find_figure(painted(disc()), anything._replace(min_explained=0.8))[1]


def test_the_rule_is_the_same_inside_a_training_in_half_precision():
    image = painted(disc((44, 50), 20))
    want = find_figure(image, RULE)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_figure(image, RULE)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    assert want[1].item()

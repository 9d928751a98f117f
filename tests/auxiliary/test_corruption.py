"""Curves, shuffles and blocks equal their descriptions, picture by picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.auxiliary import corruption
from fewmask.auxiliary.corruption import (
    Corruption,
    bend,
    bezier,
    block_numbers,
    draw_blocks,
    draw_curves,
    paint,
    shuffle_locally,
    shuffle_within,
    tabulate,
)


def casteljau(points: list[float], t: float) -> float:
    """A Bezier curve's value by repeated interpolation."""
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in itertools.pairwise(points)]
    return points[0]


def test_bezier_equals_repeated_interpolation():
    controls = torch.tensor([[0.2, 0.9], [1.0, 0.0], [0.0, 0.0]])
    values = bezier(controls)
    for row, (a, b) in zip(values, controls.tolist(), strict=True):
        for i in range(0, 1000, 37):
            assert row[i].item() == pytest.approx(casteljau([0.0, a, b, 1.0], i / 999), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_curves_equal_numpys_interpolation_and_are_monotone(seed):
    torch.manual_seed(seed)
    across, up = bezier(torch.rand(3, 2)), bezier(torch.rand(3, 2))
    table = tabulate(across, up)
    for i in range(3):
        expected = np.interp(np.linspace(0, 1, 256), across[i].numpy(), up[i].numpy())
        np.testing.assert_allclose(table[i].numpy(), expected, atol=2e-4)
    curves = draw_curves(8)
    steps = curves.diff(dim=1)
    assert ((steps >= -1e-6).all(1) | (steps <= 1e-6).all(1)).all()
    assert curves.min() >= 0
    assert curves.max() <= 1


def test_half_of_the_curves_fall_and_all_keep_black_and_white_apart():
    torch.manual_seed(0)
    ends = draw_curves(400)[:, [0, -1]]
    falling = ends[:, 0] > ends[:, 1]
    assert 0.42 < falling.float().mean() < 0.58
    torch.testing.assert_close(ends.sort(1).values, torch.tensor([[0.0, 1.0]]).expand(400, 2), atol=1e-6, rtol=0)


def test_bend_sends_each_picture_through_its_own_curve():
    torch.manual_seed(0)
    x, curves = torch.rand(3, 3, 6, 6), draw_curves(3)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    bent = bend(x, curves)
    for i in range(3):
        expected = np.interp(x[i].numpy(), np.arange(256) / 255, curves[i].numpy())
        np.testing.assert_allclose(bent[i].numpy(), expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 12), seed=st.integers(0, 999))
def test_a_shuffle_permutes_the_pixels_of_every_block(size, seed):
    torch.manual_seed(seed)
    side, offset = torch.randint(2, 6, (2,)), torch.randint(6, (2, 2))
    x = torch.rand(2, 3, size, size)
    shuffled = shuffle_within(x, block_numbers(size, side, offset))
    for i in range(2):
        blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row in range(size):
            for column in range(size):
                key = ((row + int(offset[i, 0])) // int(side[i]), (column + int(offset[i, 1])) // int(side[i]))
                blocks.setdefault(key, []).append((row, column))
        for pixels in blocks.values():
            before = sorted(tuple(x[i, :, r, c].tolist()) for r, c in pixels)
            after = sorted(tuple(shuffled[i, :, r, c].tolist()) for r, c in pixels)
            assert before == after  # whole pixels: the three channels stay together


def test_every_place_of_a_block_is_reached_by_every_pixel():
    torch.manual_seed(0)
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(400, 1, 2, 2)
    shuffled = shuffle_within(x, torch.zeros(400, 4, dtype=torch.int64)).flatten(1)
    for place in range(4):
        counts = torch.bincount(shuffled[:, place].long(), minlength=4)
        assert (counts > 70).all()


def test_local_shuffling_moves_pixels_a_tenth_of_the_side_at_most():
    torch.manual_seed(0)
    line = torch.arange(60.0)
    x = torch.stack([line.expand(60, 60), line[:, None].expand(60, 60)]).expand(20, 2, 60, 60)
    moved = (shuffle_locally(x) - x).abs()
    assert moved.max() == 5  # blocks of six pixels
    assert (moved.flatten(1).amax(1) > 0).all()


def test_a_single_block_is_a_rectangle_within_the_bounds(monkeypatch):
    monkeypatch.setattr(corruption, "NEXT_BLOCK", 0.0)
    torch.manual_seed(0)
    sides, corners = set(), set()
    for mask in draw_blocks(200, 24, 4, 8, first=1.0):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert mask.sum() == height * width
        sides |= {height, width}
        corners |= {int(rows[0]), int(columns[0])}
        corners |= {int(rows[-1]), int(columns[-1])}
    assert sides == set(range(4, 9))
    assert (min(corners), max(corners)) == (0, 23)
    assert not draw_blocks(20, 24, 4, 8, first=0.0).any()


def test_at_most_five_blocks_and_nearly_always_five():
    torch.manual_seed(0)
    counts = draw_blocks(300, 120, 1, 1, first=0.95).flatten(1).sum(1)
    assert counts.max() == 5
    assert (counts == 5).float().mean().item() == pytest.approx(0.95**5, abs=0.07)
    assert (counts == 0).float().mean().item() == pytest.approx(0.05, abs=0.03)


def test_painting_replaces_blocks_or_all_but_windows_by_noise():
    torch.manual_seed(0)
    x = torch.full((64, 3, 42, 42), 2.0)  # no noise is above 1
    for share, least, most in ((0.0, 0.0, 5 * (14 / 42) ** 2), (1.0, 0.0, 1 - (18 / 42) ** 2)):
        painted = paint(x, share)
        hidden = painted != 2.0
        assert torch.equal(hidden[:, 0], hidden[:, 1])
        assert least <= hidden.float().mean((1, 2, 3)).min()
        assert hidden.float().mean((1, 2, 3)).max() <= most
        assert painted[hidden].std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert (paint(x, 1.0)[:, 0] != 2.0).any(2).any(1).float().mean() > 0.9


def test_probabilities_are_per_picture():
    torch.manual_seed(0)
    x = torch.rand(400, 3, 20, 20)
    assert torch.equal(Corruption(0, 0, 0, 0)(x), x)
    for settings_, expected in (((0.9, 0, 0, 0), 0.9), ((0, 0.5, 0, 0), 0.5), ((0, 0, 0.9, 1.0), 0.9)):
        changed = (Corruption(*settings_)(x) != x).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(expected, abs=0.06)

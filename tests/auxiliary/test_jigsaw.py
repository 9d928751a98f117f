"""Tiles are laid as loops would lay them, permutations are chosen as loops would choose them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.auxiliary.jigsaw import lay_tiles, spread_permutations
from fewmask.data.augment import PlainViews
from tests.auxiliary.tiny import TinyTrunk, make, raw_batch


@settings(max_examples=25, deadline=None)
@given(tile=st.integers(1, 4), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_tiles_are_laid_as_by_loops(tile, gap, seed):
    torch.manual_seed(seed)
    cell = tile + gap
    picture = torch.rand(2, 3, 3 * cell, 3 * cell)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    jitter = torch.randint(gap + 1, (2, 9, 2))
    laid = lay_tiles(picture, order, jitter, tile)
    for i, place in itertools.product(range(2), range(9)):
        row, column = divmod(int(order[i, place]), 3)
        top, left = row * cell + int(jitter[i, place, 0]), column * cell + int(jitter[i, place, 1])
        y, x = (tile * v for v in divmod(place, 3))
        expected = picture[i, :, top : top + tile, left : left + tile]
        assert torch.equal(laid[i, :, y : y + tile, x : x + tile], expected)


def test_the_number_tells_how_to_lay_the_tiles_back():
    task, _ = make("jigsaw", TinyTrunk(48), gap=0.0, augment=[])
    torch.manual_seed(0)
    plain, seen = PlainViews(48)(raw_batch(6)).image, task.views()(raw_batch(6))
    assert len(set(seen.extra["permutation"].tolist())) > 1
    inverse = task.permutations[seen.extra["permutation"]].argsort(1)
    back = lay_tiles(seen.image, inverse, torch.zeros(6, 9, 2, dtype=torch.int64), 16)
    torch.testing.assert_close(back, plain)


def test_tiles_keep_within_their_cells_and_use_all_of_the_gap():
    task, _ = make("jigsaw", TinyTrunk(48), gap=0.5, augment=[])
    assert (task.tile, task.cell) == (16, 24)
    raw = raw_batch(16, side=72)
    raw.image[:] = (torch.arange(72) * 3).to(torch.uint8)  # the column is in the colour
    torch.manual_seed(0)
    seen = task.views()(raw)
    first = (seen.image[:, 0, ::16, ::16].flatten(1) * 0.229 + 0.485) * 255 / 3
    offset = first.round().long() - 24 * (task.permutations[seen.extra["permutation"]] % 3)
    assert (offset.min(), offset.max()) == (0, 8)


def literal_choice(length: int, num: int) -> list[tuple[int, ...]]:
    """Greedy farthest-first by loops."""
    every = list(itertools.permutations(range(length)))
    taken = [every[0]]
    while len(taken) < num:

        def distances(p):
            return [sum(a != b for a, b in zip(p, q, strict=True)) for q in taken]

        taken.append(max(every, key=lambda p: (min(distances(p)), sum(distances(p)))))
    return taken


@pytest.mark.parametrize(("length", "num"), [(3, 6), (4, 9), (5, 12)])
def test_permutations_are_chosen_greedily_by_distance(length, num):
    assert list(spread_permutations(length, num)) == literal_choice(length, num)


def test_the_default_permutations_are_far_apart():
    chosen = spread_permutations(9, 24)
    assert all(sorted(p) == list(range(9)) for p in chosen)
    distances = [sum(a != b for a, b in zip(p, q, strict=True)) for p, q in itertools.combinations(chosen, 2)]
    assert min(distances) >= 7  # two random permutations differ in eight places on average, and some in few
    assert chosen[0] == tuple(range(9))

"""Quarter turns equal rot90 image by image, and each kind of augmentation does what its name says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.auxiliary.augmentation import Augmentation, turn_quarters
from tests.auxiliary.tiny import SIZE, raw_batch


@settings(max_examples=25, deadline=None)
@given(num=st.integers(1, 9), start=st.integers(0, 3), size=st.integers(1, 5))
def test_quarter_turns_equal_rot90_of_each_image(num, start, size):
    x = torch.rand(num, 2, size, size)
    turned, turns = turn_quarters(x, start)
    for i in range(num):
        assert torch.equal(turned[i], torch.rot90(x[i], int(turns[i]), (1, 2)))
    counts = torch.bincount(turns, minlength=4)
    assert counts.max() - counts.min() <= 1


def moved(*kinds: str, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return Augmentation(SIZE, frozenset(kinds)).move(raw_batch(16))


@pytest.mark.parametrize(("kind", "changes"), [
    ("flip", [lambda x: x, lambda x: x.flip(2)]),
    ("vertical_flip", [lambda x: x, lambda x: x.flip(1)]),
    ("rotation", [lambda x, k=k: torch.rot90(x, k, (1, 2)) for k in range(4)]),
])  # fmt: skip
def test_each_kind_makes_its_own_changes_and_no_other(kind, changes):
    plain, seen = moved(), set()
    for original, changed in zip(plain, moved(kind), strict=True):
        fits = [i for i, change in enumerate(changes) if torch.allclose(change(original), changed, atol=1e-5)]
        assert len(fits) == 1
        seen |= set(fits)
    assert seen == set(range(len(changes)))


def test_the_mask_moves_with_its_picture():
    raw = raw_batch(8)
    raw.image[:, 0] = raw.mask[:, 0]
    torch.manual_seed(0)
    x = Augmentation(SIZE, frozenset({"crop", "flip", "vertical_flip", "rotation"})).move(raw)
    torch.testing.assert_close(x[:, 0], x[:, 3])


def test_a_crop_is_of_the_share_asked_for():
    raw = raw_batch(32)
    ramp = torch.arange(40, dtype=torch.uint8) * 6
    raw.image[:, 0], raw.image[:, 1] = ramp, ramp[:, None]
    torch.manual_seed(0)
    x = Augmentation(SIZE, frozenset({"crop"}), (0.3, 0.5)).move(raw) * 255 / 6
    # The slope of a ramp is the share of the side that the crop covers.
    wide = (x[:, 0, 16, 30] - x[:, 0, 16, 2]) / 28 * SIZE / 40
    high = (x[:, 1, 30, 16] - x[:, 1, 2, 16]) / 28 * SIZE / 40
    area = wide * high
    assert 0.27 < area.min() < 0.36
    assert 0.44 < area.max() < 0.53


def test_colour_is_left_alone_unless_asked_for():
    picture = torch.rand(4, 3, 8, 8)
    assert Augmentation(8, frozenset({"crop", "rotation"})).colour(picture) is picture
    assert not torch.equal(Augmentation(8, frozenset({"colour"})).colour(picture), picture)

"""The turn that is to be predicted is the turn the picture has."""

from __future__ import annotations

import math

import pytest
import torch

from fewmask.data.augment import PlainViews
from tests.auxiliary.tiny import make, raw_batch


@pytest.mark.parametrize("num", [1, 3, 8])
def test_target_is_the_turn_of_the_plain_picture(num):
    task, _ = make("rotation", augment=[])
    plain, seen = PlainViews(32)(raw_batch(num)).image, task.views()(raw_batch(num))
    for i in range(num):
        expected = torch.rot90(plain[i], int(seen.extra["turn"][i]), (1, 2))
        torch.testing.assert_close(seen.image[i], expected)


def test_every_turn_is_as_likely_in_a_batch_of_one():
    task, _ = make("rotation")
    turns = [int(task.views()(raw_batch(1)).extra["turn"]) for _ in range(60)]
    assert all(turns.count(k) > 5 for k in range(4))


def test_a_head_that_knows_nothing_pays_log_four():
    task, trunk = make("rotation")
    torch.nn.init.zeros_(task.head.weight)
    torch.nn.init.zeros_(task.head.bias)
    terms = task(trunk, task.views()(raw_batch(8)))
    assert terms["loss"].item() == pytest.approx(math.log(4))
    assert terms["accuracy"].item() == pytest.approx(0.25)  # it always answers 0, which a quarter of the batch is

"""The target of restoration is the clean picture, and the loss the mean squared error to it."""

from __future__ import annotations

import pytest
import torch

from fewmask.data.augment import PlainViews
from tests.auxiliary.tiny import make, raw_batch


def test_target_is_the_plain_picture_and_the_input_is_not():
    task, _ = make("restoration", augment=[])
    torch.manual_seed(0)
    seen = task.views()(raw_batch(8))
    torch.testing.assert_close(seen.extra["clean"], PlainViews(32)(raw_batch(8)).image)
    assert (seen.image - seen.extra["clean"]).abs().flatten(1).amax(1).gt(0.1).float().mean() > 0.8
    untouched, _ = make("restoration", curve=0.0, shuffle=0.0, paint=0.0)
    seen = untouched.views()(raw_batch(8))
    assert torch.equal(seen.image, seen.extra["clean"])


@torch.no_grad()
def test_loss_equals_the_equation():
    task, trunk = make("restoration")
    batch = task.views()(raw_batch(3))
    restored = task.head(trunk.eval()(batch.image))
    errors = [((restored[i] - batch.extra["clean"][i]) ** 2).mean().item() for i in range(3)]
    assert task(trunk, batch)["loss"].item() == pytest.approx(sum(errors) / 3, rel=1e-5)

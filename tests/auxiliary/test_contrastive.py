"""NT-Xent equals its equation written with loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewmask.auxiliary.contrastive import similarities
from fewmask.types import UserError
from tests.auxiliary.tiny import make, raw_batch


def literal_loss(z: torch.Tensor, temperature: float) -> float:
    """Equation 1 of SimCLR for every ordered positive pair; the views of image i are rows i and i + b."""
    num = len(z) // 2
    total = 0.0
    for i in range(2 * num):
        j = (i + num) % (2 * num)
        cosines = [float(z[i] @ z[k] / (z[i].norm() * z[k].norm())) / temperature for k in range(2 * num)]
        total -= cosines[j] - math.log(sum(math.exp(c) for k, c in enumerate(cosines) if k != i))
    return total / (2 * num)


@settings(max_examples=25, deadline=None)
@given(num=st.integers(2, 5), temperature=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_loss_equals_the_equation(num, temperature, seed):
    z = torch.randn(2 * num, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = F.cross_entropy(*similarities(z, temperature)).item()
    assert loss == pytest.approx(literal_loss(z, temperature), rel=1e-4)


def test_equal_views_of_orthogonal_images_have_a_closed_form():
    z = torch.eye(4).repeat(2, 1)
    loss = F.cross_entropy(*similarities(z, 0.5)).item()
    assert loss == pytest.approx(math.log(1 + 6 * math.exp(-2)), rel=1e-5)


def test_the_two_views_are_of_the_same_images_and_differ():
    task, trunk = make("contrastive", augment=["flip"])
    torch.manual_seed(0)
    seen = task.views()(raw_batch(8))
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen.image, seen.extra["second"], strict=True)]
    turned = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(seen.image, seen.extra["second"], strict=True)]
    assert any(same)
    assert any(turned)
    assert all(s or t for s, t in zip(same, turned, strict=True))
    assert task(trunk, seen)["loss"].isfinite()


def test_a_batch_of_one_is_refused():
    task, trunk = make("contrastive")
    with pytest.raises(UserError, match="batch of one"):
        task(trunk, task.views()(raw_batch(1)))

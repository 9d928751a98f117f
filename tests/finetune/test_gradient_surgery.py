"""Gradient surgery equals PCGrad's algorithm, on toy problems and written with loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewmask.finetune.gradient_surgery import project, surgery_loss


def literal(gradients: list[list[float]], orders: list[list[int]]) -> list[float]:
    """Algorithm 1 of Yu et al. 2020 in plain Python; `orders[i]` is the order of the other tasks for task i."""
    total = [0.0] * len(gradients[0])
    for i, order in enumerate(orders):
        g = list(gradients[i])
        for j in order:
            other = gradients[j]
            inner = sum(a * b for a, b in zip(g, other, strict=True))
            if inner < 0:
                square = sum(b * b for b in other)
                g = [a - inner / square * b for a, b in zip(g, other, strict=True)]
        total = [t + a for t, a in zip(total, g, strict=True)]
    return total


@settings(max_examples=25, deadline=None)
@given(num=st.integers(1, 5), dim=st.integers(1, 6), seed=st.integers(0, 999))
def test_projection_equals_the_algorithm(num, dim, seed):
    torch.manual_seed(seed)
    gradients = [torch.randn(dim, dtype=torch.float64) for _ in range(num)]
    torch.manual_seed(seed)
    orders = []
    for i in range(num):
        others = [j for j in range(num) if j != i]
        orders.append([others[k] for k in torch.randperm(num - 1).tolist()])
    torch.manual_seed(seed)
    expected = literal([g.tolist() for g in gradients], orders)
    assert project(gradients).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_two_conflicting_gradients_by_hand():
    # g1 = (1, 0), g2 = (-1, 1): inner product -1. g1 -> (1/2, 1/2), g2 -> (0, 1).
    torch.testing.assert_close(project([torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])]), torch.tensor([0.5, 1.5]))
    agreeing = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0])]
    assert torch.equal(project(agreeing), torch.tensor([1.5, 1.0]))
    opposite = [torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])]
    assert torch.equal(project(opposite), torch.zeros(2))
    assert torch.equal(project([torch.zeros(2), torch.tensor([1.0, 2.0])]), torch.tensor([1.0, 2.0]))


class Toy(nn.Module):
    """Two tasks on one shared matrix, with a head each, that want opposite answers to nearly one question."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shared = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.unused = nn.Parameter(torch.ones(2))
        head, x = torch.randn(3, generator=generator), torch.randn(2, generator=generator)
        self.heads = nn.ParameterList([head, head + 0.3 * torch.randn(3, generator=generator)])
        self.x = torch.stack([x, x + 0.3])

    def losses(self) -> list[torch.Tensor]:
        return [((self.heads[i] @ torch.tanh(self.shared @ self.x[i]) - 4 * (-1) ** i) ** 2) for i in range(2)]


def test_backward_gives_the_formula_on_shared_and_the_plain_gradient_on_heads():
    toy = Toy()
    first, second = toy.losses()
    each = [torch.autograd.grad(loss, [toy.shared, toy.heads[i]]) for i, loss in enumerate((first, second))]
    g1, g2 = each[0][0], each[1][0]
    inner = (g1 * g2).sum()
    assert inner < 0  # the two tasks are in conflict
    expected = g1 - inner / (g2 * g2).sum() * g2 + g2 - inner / (g1 * g1).sum() * g1
    total = surgery_loss(toy.losses(), [toy.shared, toy.unused], list(toy.heads))
    assert total.item() == pytest.approx((first + second).item())
    (3 * total).backward()  # a loss scaler multiplies the loss
    torch.testing.assert_close(toy.shared.grad, 3 * expected)
    for i in range(2):
        torch.testing.assert_close(toy.heads[i].grad, 3 * each[i][1])
    assert toy.unused.grad is None


def test_without_gradient_mode_it_is_the_sum():
    toy = Toy()
    with torch.no_grad():
        total = surgery_loss(toy.losses(), [toy.shared], list(toy.heads))
        assert total.item() == pytest.approx(sum(toy.losses()).item())

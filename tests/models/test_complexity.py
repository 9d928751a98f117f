"""Multiplications and additions are those of closed forms, and counting leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewmask.models import build_encoder
from fewmask.models.complexity import complexity


class ByHand(nn.Module):
    """Dense, strided, grouped and transposed convolutions, and a linear layer, with what is not counted between."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.linear = nn.Linear(4, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.up(self.depthwise(self.norm(self.dense(image)).relu()))
        return self.linear(nn.functional.interpolate(x, scale_factor=2.0).mean((2, 3)))


@pytest.mark.parametrize("size", [16, 32])
def test_a_network_made_by_hand(size):
    half = (size // 2) ** 2
    macs = half * 8 * 27 + half * 8 * 25 + half * 8 * 4 * 4 + 4 * 6
    cost = complexity(ByHand(), size)
    assert cost["gmacs"] == pytest.approx(macs / 1e9, rel=1e-12)
    assert cost["num_parameters"] == (8 * 27 + 8) + 16 + 8 * 25 + (8 * 4 * 4 + 4) + 4 * 6 + 6


def test_attention_counts_as_its_two_products():
    n, d, depth = 1 + 4, 192, 12
    patches = 4 * 3 * 16**2 * d
    blocks = depth * (n * 4 * d * d + 2 * n * n * d + 2 * n * d * 4 * d)
    assert complexity(build_encoder("vit_tiny_patch16", size=32), 32)["gmacs"] == pytest.approx(
        (patches + blocks) / 1e9
    )


def test_the_network_is_left_as_it_is():
    network = ByHand().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    complexity(network, 16)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network(torch.zeros(2, 3, 16, 16)).requires_grad

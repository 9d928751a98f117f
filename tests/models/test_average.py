"""The running average of weights follows its formula and survives an interruption."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewmask.models.average import WeightAverage


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_average_follows_its_formula(decay):
    model = nn.Linear(2, 1)
    average = WeightAverage(model, decay)
    expected = model.weight.detach().clone().double()
    for t in range(30):
        with torch.no_grad():
            model.weight += torch.tensor([[1.0, -0.5]]) * (t % 3)
        average.update(model)
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * model.weight.detach().double()
        torch.testing.assert_close(average.model.weight.double(), expected, atol=1e-4, rtol=1e-5)
    assert average.num_updates == 30


def test_an_interrupted_average_goes_on_where_it_stopped():
    model = nn.Linear(2, 1)
    average = WeightAverage(model, 0.99)
    for _ in range(5):
        average.update(model)
    other = WeightAverage(model, 0.99)
    other.load_state_dict(average.state_dict())
    assert other.num_updates == 5

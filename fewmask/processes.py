"""What several processes that train together tell one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def num_processes() -> int:
    """Return how many processes train together, 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """Return which of them this one is, from 0."""
    return distributed.get_rank() if num_processes() > 1 else 0


@torch.no_grad()
def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, which must hold equal shares of the batch; no gradient."""
    value = value.detach()
    if num_processes() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / num_processes()


def mean_with_gradient(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, whose gradient goes back to each."""
    return value if num_processes() == 1 else SumOverProcesses.apply(value) / num_processes()


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs (torch's own is on its way out)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return the sum."""
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the sum of all processes' gradients."""
        return SumOverProcesses.forward(ctx, gradients[0])

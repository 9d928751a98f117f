"""Dropped paths that do not depend on how many processes share a batch."""

from __future__ import annotations

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from fewmask.draws import draw_each


def share_drop_paths(body: nn.Module) -> None:
    """Make every timm `DropPath` of a network a `SharedDropPath`, in place."""
    for module in body.modules():
        if type(module) is DropPath:
            module.__class__ = SharedDropPath


class SharedDropPath(DropPath):
    """timm's stochastic depth: each image loses the path with probability `drop_prob`, by a draw of its own.

    The same draws as timm's in one process; of several, each draws for the whole batch (see `draw_each`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (b, ...), zero where the path is dropped, the rest enlarged to keep the mean."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = draw_each(len(x), lambda n: torch.empty(n, dtype=x.dtype, device=x.device).bernoulli_(keep))
        if self.scale_by_keep:
            kept = kept / keep
        return x * kept.view(-1, *[1] * (x.ndim - 1))

"""DF: attention that decides, token by token and channel by channel, which of two views to believe."""

from __future__ import annotations

from torch import Tensor, nn

from fewmask.types import UserError


class DynamicFeatures(nn.Module):
    """Merge the tokens of two views of an image by a learnt gate: w x + (1 - w) y (TEDMAE's DF).

    Paper (TEDMAE, abstract): a non-linear attention mechanism that merges features. Ours: the gate of attentional
    feature fusion (Dai et al. 2021), w = sigmoid(local(x + y) + global(mean over tokens of x + y)), each branch two
    linear layers with a reduction of 4, a ReLU between them, and LayerNorm where that paper has batch normalisation,
    since tokens have no such statistics; a LayerNorm at a branch's end leaves it to the channels, not to whole tokens,
    which view is believed. Equal views merge into themselves. Raises UserError for a reduction below 1.
    """

    def __init__(self, dim: int, reduction: int = 4) -> None:
        if not 1 <= reduction <= dim:
            raise UserError(f"'reduction' cannot be {reduction}: give a number from 1 to {dim}, such as 4.")
        super().__init__()
        self.local_branch = gate_branch(dim, dim // reduction)
        self.global_branch = gate_branch(dim, dim // reduction)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the merged tokens (b, n, d) of two views' tokens (b, n, d)."""
        both = x + y
        gate = (self.local_branch(both) + self.global_branch(both.mean(1, keepdim=True))).sigmoid()
        return gate * x + (1 - gate) * y


def gate_branch(dim: int, hidden: int) -> nn.Sequential:
    """Return one branch of the gate, from (b, n, dim) to the same."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.LayerNorm(dim)
    )

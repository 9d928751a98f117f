"""The head that turns a global feature into scores over prototypes, on which student and teacher are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.types import UserError


class Projector(nn.Module):
    """A 3-layer MLP, then cosine similarities to learnt prototypes.

    Paper (G2LL): P is a 3-layer MLP, its output as wide as DINO's. Code (DINO): hidden 2048, GELU, bottleneck 256,
    L2 normalisation, a weight-normed last layer whose norms stay one, truncated normal initialisation (std 0.02; the
    last layer's directions begin as torch's Linear does), and 65,536 prototypes for 1.2 M images; here their number is
    a parameter, as small sets cannot fill that many.
    Ours: the last layer's weights are normalised when they are used, so the state is plain tensors.

    `freeze_last`: until this share of the training the last layer has no gradient, and the optimiser leaves it and its
    own memory of it alone (DINO: one epoch of 100); a share of zero freezes nothing. Raises UserError for sizes below
    one or a share outside [0, 1).
    """

    def __init__(
        self, dim: int, num_prototypes: int, hidden: int = 2048, bottleneck: int = 256, freeze_last: float = 0.0
    ) -> None:
        check_projector(num_prototypes, hidden, bottleneck, freeze_last)
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # As short as torch's Linear makes them: the longer a row, the less a step of Adam turns it.
        nn.init.uniform_(self.prototypes, -(bottleneck**-0.5), bottleneck**-0.5)
        self.freeze_last = freeze_last

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}gate", None)  # a buffer of earlier versions, which said whether the last layer is held
        super()._load_from_state_dict(state_dict, prefix, *args)

    def embed(self, feature: Tensor) -> Tensor:
        """Return the bottleneck of unit length, float32 (b, bottleneck), of a global feature (b, d)."""
        return F.normalize(self.mlp(feature).float(), dim=1)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the scores in [-1, 1], (b, num_prototypes) in the precision of the products, of a feature (b, d)."""
        return F.linear(self.embed(feature), F.normalize(self.prototypes.float(), dim=1))

    def before_step(self, progress: float) -> None:
        """Take the last layer's gradient away until its time has come."""
        if progress < self.freeze_last:
            # Not a gradient of zero: AdamW would shrink the weights, and step too far at first when one comes.
            self.prototypes.grad = None


def check_projector(num_prototypes: int, hidden: int, bottleneck: int, freeze_last: float) -> None:
    """Raise a UserError unless the sizes are possible."""
    if min(hidden, bottleneck) < 1 or num_prototypes < 2:
        raise UserError(
            f"A projector with {num_prototypes} prototypes, {hidden} hidden units and a bottleneck of {bottleneck} "
            "cannot be built: give at least 2 prototypes and sizes above zero."
        )
    if not 0 <= freeze_last < 1:
        raise UserError(f"'freeze_last' cannot be {freeze_last}: give a share of the training of at least 0, below 1.")

"""What a network costs to run, counted and not timed."""

from __future__ import annotations

import copy
from typing import TypedDict

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Complexity(TypedDict):
    """`num_parameters`, each counted once, and `gmacs`, billions of multiplications and additions."""

    num_parameters: int
    gmacs: float


def complexity(segmenter: nn.Module, size: int = 256) -> Complexity:
    """Return the parameters of a network and the GMacs of one forward pass on one image (1, 3, size, size).

    Counted are convolutions and matrix products, attention's included, as half of what torch's counter of floating
    point operations says; what is done once a value (normalisation, activation, resize) is not, as is the custom. The
    network is left as it is.
    """
    network = copy.deepcopy(segmenter).cpu().eval()
    counter = FlopCounterMode(display=False)
    # The fused attention of a CPU is not in torch's table; spelt out, it is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.zeros(1, 3, size, size))
    return {
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gmacs": counter.get_total_flops() / 2e9,
    }

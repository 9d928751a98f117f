"""The shapes of what a segmenter returns, found by running it once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fewmask.types import SegOutput


class Widths(NamedTuple):
    """Channels and strides (pixels of the input a position) of a segmenter's features, fine to coarse.

    Strides are rounded to whole pixels, at least 1: a teacher that works at another size than the student has odd ones.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]


@torch.no_grad()
def dry_run(network: nn.Module, size: int, device: torch.device | None = None) -> SegOutput:
    """Return the output for one black image of `size` pixels a side, in eval mode; the network is left as it was."""
    modes = {module: module.training for module in network.modules()}
    output = network.eval()(torch.zeros(1, 3, size, size, device=device))
    for module, mode in modes.items():
        module.training = mode
    return output


def widths_of(network: nn.Module, size: int, device: torch.device | None = None) -> Widths:
    """Return the widths of a network's features for images of `size` pixels a side."""
    return describe(dry_run(network, size, device), size)


def describe(output: SegOutput, size: int) -> Widths:
    """Return the widths of the features of an output for images of `size` pixels a side."""
    strides = tuple(max(round(size / feature.shape[2]), 1) for feature in output.features)
    return Widths(tuple(feature.shape[1] for feature in output.features), strides)

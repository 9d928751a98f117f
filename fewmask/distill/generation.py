"""The block that makes a teacher's feature of what masking left of the student's."""

from __future__ import annotations

from torch import nn


class Generation(nn.Sequential):
    """3x3 convolution, ReLU, 3x3 convolution, width and resolution kept (MGD, Yang et al. 2022)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
        )

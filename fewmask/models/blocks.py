"""The convolutions that light decoders are made of: each with batch normalisation, and no bias of its own."""

from __future__ import annotations

from torch import nn

from fewmask.models.cnn import DepthwiseConv2d


def depthwise(width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a depthwise convolution (b, width, h, w) -> (b, width, h / stride, w / stride) with an odd kernel."""
    return DepthwiseConv2d(width, width, kernel, stride=stride, padding=kernel // 2, groups=width, bias=False)


def conv_norm(num_in: int, num_out: int, kernel: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Return a convolution with an odd kernel, batch normalisation and, unless `act` is False, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(num_out),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


def separable(num_in: int, num_out: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 3x3 and a 1x1 convolution, both with batch normalisation and ReLU (MobileNet, 2017)."""
    return nn.Sequential(
        depthwise(num_in, 3, stride), nn.BatchNorm2d(num_in), nn.ReLU(inplace=True), conv_norm(num_in, num_out, 1)
    )

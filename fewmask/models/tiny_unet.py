"""The smallest segmenter: an encoder and a decoder made for one CPU thread, below a tenth of a million parameters."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.models.blocks import conv_norm, depthwise, separable
from fewmask.models.encoder import Encoder, check_divisible
from fewmask.models.segmenter import Segmenter
from fewmask.models.unet import check_widths
from fewmask.types import SegOutput, UserError

STRIDES = (2, 4, 8, 16)
# One a stage after the first: a position at stride 16 then sees most of a picture of 256 pixels.
KERNELS = (3, 5, 7)


class TinyCnn(Encoder):
    """A small CNN for one CPU thread: features at strides 2, 4, 8, 16 of widths `channels`.

    A strided 3x3 convolution; then, at each further stride, a strided depthwise-separable convolution and `num_blocks`
    residual blocks (`Residual`). Ours: widths are multiples of 16, the vector of a CPU; there are no blocks at stride
    4, where each costs as much time as two at stride 8; ReLU, because ONNX Runtime fuses it into a convolution.
    `size` is a multiple of 16. Raises UserError for a size, width or number of blocks that cannot be.
    """

    kind: Literal["cnn"] = "cnn"

    def __init__(
        self,
        name: str,
        size: int,
        channels: tuple[int, int, int, int] = (16, 32, 48, 64),
        num_blocks: tuple[int, int, int] = (0, 3, 2),
    ) -> None:
        check_divisible(size, STRIDES[-1], name)
        if min(channels) < 1 or min(num_blocks) < 0:
            raise UserError(
                "Settings 'model.encoder_settings.channels' and 'num_blocks' need widths of at least 1 and numbers of "
                f"at least 0, and cannot be {list(channels)} and {list(num_blocks)}."
            )
        super().__init__(name, size, {"channels": list(channels), "num_blocks": list(num_blocks)})
        self.channels, self.strides = tuple(channels), STRIDES
        self.stages = nn.ModuleList([conv_norm(3, channels[0], 3, stride=2)])
        for kernel, before, width, num in zip(KERNELS, channels, channels[1:], num_blocks, strict=False):
            blocks = [Residual(width, kernel) for _ in range(num)]
            self.stages.append(nn.Sequential(separable(before, width, stride=2), *blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features fine to coarse, (b, channels_i, s / strides_i, s / strides_i)."""
        x, features = self.input_affine(image), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class TinyUnet(Segmenter):
    """A U-shaped decoder on `TinyCnn`, of widths `decoder_channels` at strides 8, 4, 2; logits at stride 2, enlarged.

    At each stride the coarser map, reduced by a 1x1 convolution and doubled, is added to the encoder's through another
    1x1 convolution, and refined depthwise-separably (at stride 2 by the depthwise half alone). Ours: addition in place
    of U-Net's concatenation, which ONNX Runtime fuses into the convolution; nearest-neighbour doubling, which the
    depthwise convolution smooths; and, before the decoder, the mean over the picture through a 1x1 convolution, added
    everywhere, as the image branch of DeepLabv3 (Chen et al. 2017) gives context.
    The features are the decoder's at strides 2, 4, 8 and, last, the encoder's at 16. With the encoder's defaults:
    below 0.1 M parameters and 0.1 GMac at 256 x 256. Raises UserError for another encoder than `tiny`.
    """

    def __init__(self, encoder: Encoder, decoder_channels: tuple[int, int, int] = (48, 32, 16)) -> None:
        if not isinstance(encoder, TinyCnn):
            raise UserError(
                f"The segmenter 'tiny_unet' needs its own encoder, not '{encoder.name}': choose model.encoder='tiny', "
                "or model.segmenter='mobile_unet' or 'unet' for a CNN of timm."
            )
        check_widths(decoder_channels, 3)
        super().__init__("tiny_unet", encoder, {"decoder_channels": list(decoder_channels)})
        self.encoder: TinyCnn
        *skips, deepest = encoder.channels
        last = decoder_channels[-1]
        self.context = nn.Conv2d(deepest, deepest, 1)
        self.reduce, self.lateral = nn.ModuleList(), nn.ModuleList()
        for before, skip, width in zip((deepest, *decoder_channels), skips[::-1], decoder_channels, strict=False):
            self.reduce.append(conv_norm(before, width, 1, act=False))
            self.lateral.append(conv_norm(skip, width, 1, act=False))
        self.refine = nn.ModuleList(separable(width, width) for width in decoder_channels[:-1])
        self.refine.append(nn.Sequential(depthwise(last, 3), nn.BatchNorm2d(last), nn.ReLU(inplace=True)))
        self.head = nn.Conv2d(last, 1, 1)

    def forward(self, image: Tensor) -> SegOutput:
        """Return logits (b, 1, s, s) and features fine to coarse for a normalised image (b, 3, s, s)."""
        *skips, deepest = self.encoder(image)
        features = [deepest]
        # A pooling with a fixed window stays in ONNX Runtime's blocked layout, where a global mean does not.
        x = F.relu(deepest + self.context(F.avg_pool2d(deepest, deepest.shape[-2:])))
        for reduce, lateral, refine, skip in zip(self.reduce, self.lateral, self.refine, skips[::-1], strict=True):
            doubled = F.interpolate(reduce(x), scale_factor=2.0, mode="nearest")
            x = refine(F.relu(lateral(skip) + doubled))
            features.insert(0, x)
        logits = F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return SegOutput(logits, features)


class Residual(nn.Module):
    """x + a depthwise convolution, then a 1x1 convolution to twice the width, ReLU, and one back.

    The order of ConvNeXt (Liu et al. 2022) with batch normalisation after each, as MobileNetV4 (Qin et al. 2024) has
    it: the large kernel runs on the narrow map. Keeps (b, width, h, w).
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            depthwise(width, kernel),
            nn.BatchNorm2d(width),
            conv_norm(width, 2 * width, 1),
            conv_norm(2 * width, width, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (b, width, h, w)."""
        return x + self.body(x)

"""A slim U-Net on a mobile encoder, with or without ImageNet weights: at most three million parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.models.blocks import conv_norm, separable
from fewmask.models.cnn import Cnn
from fewmask.models.encoder import Encoder
from fewmask.models.segmenter import Segmenter
from fewmask.models.unet import check_widths
from fewmask.types import SegOutput, UserError

STRIDES = (2, 4, 8, 16, 32)


class MobileUnet(Segmenter):
    """A U-shaped, depthwise-separable decoder on a CNN of timm; logits at stride 2, enlarged.

    A 1x1 convolution takes the coarsest map to `decoder_channels[0]`; at strides 16, 8, 4, 2 the coarser map, doubled,
    is added to the encoder's through a 1x1 convolution and refined by a depthwise 3x3 and a 1x1 convolution, which
    takes it to the next width. Ours: addition, which ONNX Runtime fuses into the convolution, and nearest-neighbour
    doubling, which the depthwise convolution smooths.
    With the default widths 2.997 M parameters on efficientnet_lite0 (2.96 M of them its own) and 1.35 M on
    mobilenetv4_conv_small. The features are the decoder's at strides 2, 4, 8, 16 and, last, the encoder's at 32.
    Raises UserError for an encoder without features at strides 2 to 32.
    """

    def __init__(self, encoder: Encoder, decoder_channels: tuple[int, int, int, int] = (64, 48, 32, 24)) -> None:
        if not isinstance(encoder, Cnn) or encoder.strides != STRIDES:
            raise UserError(
                f"The segmenter 'mobile_unet' needs a CNN of timm with features at strides 2 to 32, which "
                f"'{encoder.name}' is not: choose model.encoder='efficientnet_lite0' or 'mobilenetv4_conv_small'."
            )
        check_widths(decoder_channels, 4)
        super().__init__("mobile_unet", encoder, {"decoder_channels": list(decoder_channels)})
        self.encoder: Cnn
        *skips, deepest = encoder.channels
        last = decoder_channels[-1]
        self.reduce = conv_norm(deepest, decoder_channels[0], 1)
        self.lateral = nn.ModuleList(
            conv_norm(skip, width, 1, act=False) for skip, width in zip(skips[::-1], decoder_channels, strict=True)
        )
        self.refine = nn.ModuleList(
            separable(width, following)
            for width, following in zip(decoder_channels, (*decoder_channels[1:], last), strict=True)
        )
        self.head = nn.Conv2d(last, 1, 1)

    def forward(self, image: Tensor) -> SegOutput:
        """Return logits (b, 1, s, s) and features fine to coarse for a normalised image (b, 3, s, s)."""
        *skips, deepest = self.encoder(image)
        x, features = self.reduce(deepest), [deepest]
        for lateral, refine, skip in zip(self.lateral, self.refine, skips[::-1], strict=True):
            x = refine(F.relu(lateral(skip) + F.interpolate(x, scale_factor=2.0, mode="nearest")))
            features.insert(0, x)
        logits = F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return SegOutput(logits, features)

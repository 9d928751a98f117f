"""A TransUNet-like segmenter: a vision transformer, a light convolutional stem and groups of convolutional blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.models.blocks import conv_norm
from fewmask.models.encoder import Encoder
from fewmask.models.segmenter import Segmenter
from fewmask.models.unet import check_widths
from fewmask.models.vit import Vit
from fewmask.types import SegOutput, UserError


class Transunet(Segmenter):
    """A U-shaped decoder on a plain ViT, after TransUNet (Chen et al. 2021), which G2LL fine-tunes.

    TransUNet: decoder blocks of two 3x3 convolutions, widths 256/128/64/16 at strides 8/4/2/1. Our choices: a plain
    ViT has no feature finer than a patch, so two strided convolutions on the image give the skips at strides 2 and 4
    (`stem_channels`); the features of all chosen blocks meet at the patch's stride; the skip at stride 8 of a
    patch-16 encoder is an early block's feature, enlarged; a patch-8 encoder is at that stride already and has no block
    for it, only the 1x1 convolution where its features meet. With `logit_stride` = 2 the last decoder block is left out
    and the logits are enlarged bilinearly, which halves the time of a step.
    The features are the decoder's, at strides `logit_stride` to 8, and, last, the transformer's at the patch's stride.
    Raises UserError for an encoder that is no ViT.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 16),
        stem_channels: tuple[int, int] = (16, 32),
        logit_stride: int = 1,
    ) -> None:
        if not isinstance(encoder, Vit):
            raise UserError(
                f"The segmenter 'transunet' needs a ViT encoder, but '{encoder.name}' is a {encoder.kind}: "
                "choose model.segmenter='unet' or an encoder such as vit_small_patch16."
            )
        check_widths(decoder_channels, 4)
        check_widths(stem_channels, 2, "stem_channels")
        if logit_stride not in (1, 2):
            raise UserError(f"Setting 'model.segmenter_settings.logit_stride' is 1 or 2 and cannot be {logit_stride}.")
        settings = {"decoder_channels": list(decoder_channels), "stem_channels": list(stem_channels)}
        super().__init__("transunet", encoder, {**settings, "logit_stride": logit_stride})
        self.encoder: Vit
        self.logit_stride = logit_stride
        widths = dict(zip((8, 4, 2, 1), decoder_channels, strict=True))
        self.stem = nn.ModuleList([conv_norm(3, stem_channels[0], 3, stride=2), conv_norm(*stem_channels, 3, stride=2)])
        self.fuse = conv_norm(sum(encoder.channels), widths[8], 1)
        skips = {4: stem_channels[1], 2: stem_channels[0], 1: 0}
        if encoder.patch == 16:
            self.lift = conv_norm(encoder.dim, widths[8] // 2, 1)
            skips[8] = widths[8] // 2
        self.decoder_strides = [s for s in (8, 4, 2, 1) if logit_stride <= s < encoder.patch]
        self.blocks, before = nn.ModuleDict(), widths[8]
        for stride in self.decoder_strides:
            self.blocks[str(stride)] = double_conv(before + skips[stride], widths[stride])
            before = widths[stride]
        self.head = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, image: Tensor) -> SegOutput:
        """Return logits (b, 1, s, s) and features fine to coarse for a normalised image (b, 3, s, s)."""
        maps = self.encoder(image)
        skips = self.detail(image, maps)
        x = self.fuse(torch.cat(maps, dim=1))
        features = [x]
        for stride in self.decoder_strides:
            x = enlarge(x)
            x = self.blocks[str(stride)](torch.cat([x, skips[stride]], dim=1) if stride in skips else x)
            features.insert(0, x)
        logits = self.head(x)
        return SegOutput(logits if self.logit_stride == 1 else enlarge(logits), features)

    def detail(self, image: Tensor, maps: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the skip connections by stride: the stem's at 2 and 4, and at 8 an early transformer feature."""
        half = self.stem[0](image)
        skips = {2: half, 4: self.stem[1](half)}
        if self.encoder.patch == 16:
            skips[8] = enlarge(self.lift(maps[0]))
        return skips


def enlarge(x: Tensor) -> Tensor:
    """Return a map of twice the size, bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def double_conv(num_in: int, num_out: int) -> nn.Sequential:
    """Return one group of convolutional blocks: two 3x3 convolutions with normalisation and ReLU."""
    return nn.Sequential(conv_norm(num_in, num_out, 3), conv_norm(num_out, num_out, 3))

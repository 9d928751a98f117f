"""The U-Net of segmentation-models-pytorch on an encoder that may have been trained before."""

from __future__ import annotations

from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor

from fewmask.models.cnn import Cnn
from fewmask.models.encoder import Encoder
from fewmask.models.segmenter import Segmenter
from fewmask.types import SegOutput, UserError


class Unet(Segmenter):
    """U-Net (Ronneberger et al. 2015) with nearest-neighbour upsampling: parameter for parameter `smp.Unet`.

    Needs a CNN encoder. `decoder_channels` are the widths of the five decoder blocks, coarse to fine.
    The features are the outputs of the decoder blocks at strides 1 to 16 and, last, the encoder's coarsest map.
    """

    def __init__(self, encoder: Encoder, decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)) -> None:
        if not isinstance(encoder, Cnn):
            raise UserError(
                f"The segmenter 'unet' needs a CNN of timm, which '{encoder.name}' is not: choose an encoder such as "
                "efficientnet_lite0, or model.segmenter='tiny_unet' for 'tiny' and 'transunet' for a ViT."
            )
        check_widths(decoder_channels, 5)
        super().__init__("unet", encoder, {"decoder_channels": list(decoder_channels)})
        self.encoder: Cnn
        self.decoder = UnetDecoder(
            encoder_channels=encoder.body.out_channels,
            decoder_channels=decoder_channels,
            add_center_block=encoder.name.startswith("vgg"),
        )
        self.segmentation_head = SegmentationHead(decoder_channels[-1], 1)
        initialize_decoder(self.decoder)
        initialize_head(self.segmentation_head)

    def forward(self, image: Tensor) -> SegOutput:
        """Return logits (b, 1, s, s) and the decoder's features for a normalised image (b, 3, s, s)."""
        *skips, deepest = self.encoder.pyramid(image)
        features, x = [deepest], self.decoder.center(deepest)
        for i, block in enumerate(self.decoder.blocks):
            # The finest block joins no encoder feature: its skip would be the image itself.
            level = skips[-1 - i]
            skip = level if i + 1 < len(self.decoder.blocks) and level.shape[1] else None
            x = block(x, level.shape[2], level.shape[3], skip_connection=skip)
            features.insert(0, x)
        return SegOutput(self.segmentation_head(x), features)


def check_widths(channels: tuple[int, ...], count: int, setting: str = "decoder_channels") -> None:
    """Raise a UserError unless there are `count` positive widths."""
    if len(channels) != count or min(channels) < 1:
        raise UserError(
            f"Setting 'model.segmenter_settings.{setting}' needs {count} widths of at least 1, "
            f"and cannot be {list(channels)}."
        )

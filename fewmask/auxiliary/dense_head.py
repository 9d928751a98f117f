"""A light head that predicts a map from two of an encoder's features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.models import Encoder
from fewmask.types import UserError

FINEST = 4


class DenseHead(nn.Module):
    """Predict a map (b, num_channels, s / stride, s / stride) from an encoder's coarsest and one finer feature (ours).

    The finer feature is the first at stride 4 or, if more, `stride`; both are brought to `width` channels and added,
    then a 3x3 and a 1x1 convolution and a pixel shuffle. A ViT's features all have one stride: its first serves as the
    finer one. It is light on purpose: what is learnt should be in the encoder. Raises UserError for an encoder without
    a feature whose stride is a multiple of `stride`.
    """

    def __init__(self, encoder: Encoder, num_channels: int, stride: int, width: int = 64) -> None:
        super().__init__()
        least = max(FINEST, stride)
        usable = [i for i, s in enumerate(encoder.strides) if s >= least and s % stride == 0]
        if not usable:
            raise UserError(
                f"This auxiliary task needs a feature at a stride that is a multiple of {least}, and the encoder "
                f"'{encoder.name}' has strides {list(encoder.strides)}: choose another encoder."
            )
        self.finer = usable[0]
        factor = encoder.strides[self.finer] // stride
        self.coarse = nn.Conv2d(encoder.channels[-1], width, 1)
        self.fine = nn.Conv2d(encoder.channels[self.finer], width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.predict = nn.Sequential(nn.Conv2d(width, num_channels * factor**2, 1), nn.PixelShuffle(factor))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the predicted map from the encoder's features, fine to coarse."""
        fine = self.fine(features[self.finer])
        coarse = F.interpolate(self.coarse(features[-1]), fine.shape[2:], mode="bilinear", align_corners=False)
        return self.predict(F.gelu(self.mix(F.gelu(fine + coarse))))

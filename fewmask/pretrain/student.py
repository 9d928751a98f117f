"""The masked student of G2LL and TEDMAE: tokens of what is visible, and the pixels of what is not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewmask.models import Encoder
from fewmask.models.vit import Vit, as_map
from fewmask.pretrain.mae import patch_statistics
from fewmask.pretrain.masking import split_indices
from fewmask.pretrain.patch_decoder import decoder_for
from fewmask.pretrain.patches import enlarge_mask, patchify, take, unpatchify
from fewmask.pretrain.self_distillation import pooled_first
from fewmask.types import UserError


class Hidden(NamedTuple):
    """A mask (b, n) and the indices it stands for: visible (b, n - m) and masked (b, m)."""

    mask: Tensor
    visible: Tensor
    masked: Tensor

    @classmethod
    def of(cls, mask: Tensor, num_masked: int) -> Hidden:
        """Return the mask with its indices."""
        return cls(mask, *split_indices(mask, num_masked))


class DecoderShape(NamedTuple):
    """Width, number of blocks and number of heads of the decoder, see `decoder_for`."""

    dim: int | None
    depth: int
    heads: int | None


class MaskedStudent(nn.Module, ABC):
    """An encoder that sees a masked image, and what it takes to predict the masked pixels.

    `patch` is the side in pixels of the patches that are masked, `norm_pix` standardises the target of each (MAE).
    """

    def __init__(self, encoder: Encoder, patch: int, norm_pix: bool) -> None:
        super().__init__()
        self.encoder, self.patch, self.norm_pix = encoder, patch, norm_pix
        self.num_patches = (encoder.size // patch) ** 2

    @abstractmethod
    def tokens(self, image: Tensor, hidden: Hidden) -> Tensor:
        """Return tokens (b, 1 + k, d) of an image (b, 3, s, s) without its hidden patches, the global one first."""

    @abstractmethod
    def predict(self, tokens: Tensor, hidden: Hidden) -> Tensor:
        """Return the predicted pixels (b, m, patch * patch * 3) of the masked patches from `tokens`' output."""

    def error(self, image: Tensor, tokens: Tensor, hidden: Hidden) -> Tensor:
        """Return the squared error averaged over the masked patches and their pixels (G2LL, equation 3): a scalar."""
        target = take(patchify(image, self.patch), hidden.masked)
        if self.norm_pix:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return (self.predict(tokens, hidden).float() - target).square().mean()

    def paint(self, image: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Return the image (b, 3, s, s) without its hidden patches, and with the predicted ones in their place."""
        pixels = patchify(image, self.patch)
        prediction = self.predict(self.tokens(image, hidden), hidden).float()
        if self.norm_pix:
            mean, std = patch_statistics(take(pixels, hidden.masked))
            prediction = prediction * std + mean
        where = hidden.masked[..., None].expand_as(prediction)
        masked = pixels.masked_fill(hidden.mask[..., None], 0.0)
        return unpatchify(masked, self.patch), unpatchify(pixels.scatter(1, where, prediction), self.patch)


class VisibleTokens(MaskedStudent):
    """A ViT that runs on the visible patches only, and MAE's decoder (G2LL's student)."""

    encoder: Vit

    def __init__(self, encoder: Vit, decoder: DecoderShape, norm_pix: bool) -> None:
        super().__init__(encoder, encoder.patch, norm_pix)
        self.decoder = decoder_for(encoder, *decoder)

    def tokens(self, image: Tensor, hidden: Hidden) -> Tensor:
        """Return the class token and the visible patches' tokens."""
        return self.encoder.tokens(image, hidden.visible)

    def predict(self, tokens: Tensor, hidden: Hidden) -> Tensor:
        """Return what the decoder makes of the tokens."""
        return self.decoder(tokens, hidden.visible, hidden.masked)


class HiddenPixels(MaskedStudent):
    """A CNN that sees the image with its masked pixels painted over (G2LL, equation 4), and SimMIM's head.

    Ours, as in `SimMIM`: the paint is a learnt colour that starts at the mean colour, the head a 1x1
    convolution and pixel shuffle on the coarsest map, and the global feature the mean of that map.
    """

    def __init__(self, encoder: Encoder, patch: int, norm_pix: bool) -> None:
        super().__init__(encoder, patch, norm_pix)
        stride = encoder.strides[-1]
        self.filler = nn.Parameter(torch.zeros(3))
        self.head = nn.Sequential(nn.Conv2d(encoder.channels[-1], stride**2 * 3, 1), nn.PixelShuffle(stride))

    def tokens(self, image: Tensor, hidden: Hidden) -> Tensor:
        """Return the mean of the coarsest map, then its positions."""
        painted = torch.where(enlarge_mask(hidden.mask, self.patch), self.filler.view(1, 3, 1, 1), image)
        return pooled_first(self.encoder(painted)[-1])

    def predict(self, tokens: Tensor, hidden: Hidden) -> Tensor:
        """Return the masked patches of the image that the head paints."""
        side = self.encoder.size // self.encoder.strides[-1]
        painted = self.head(as_map(tokens[:, 1:], side, side))
        return take(patchify(painted, self.patch), hidden.masked)


def build_student(encoder: Encoder, mask_patch: int | None, decoder: DecoderShape, norm_pix: bool) -> MaskedStudent:
    """Return the student for an encoder: tokens are dropped where it is a ViT, pixels painted over where it is a CNN.

    `mask_patch` is the side in pixels of what is masked: a ViT's is its own patch; for a CNN the default is a sixteenth
    of the image (n = 256, as the paper has it). Raises UserError where it does not fit.
    """
    if isinstance(encoder, Vit):
        if mask_patch not in (None, encoder.patch):
            raise UserError(
                f"Setting 'mask_patch' = {mask_patch} is not the patch of the encoder '{encoder.name}', which is "
                f"{encoder.patch}: leave it out."
            )
        return VisibleTokens(encoder, decoder, norm_pix)
    patch = encoder.size // 16 if mask_patch is None else mask_patch
    if patch < 1 or encoder.size % patch:
        raise UserError(
            f"Setting 'mask_patch' = {patch} does not divide the image size {encoder.size}: choose a divisor."
        )
    return HiddenPixels(encoder, patch, norm_pix)

"""SimMIM: masked image modelling for any encoder, vision transformer or CNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewmask.data.preprocess import denormalise
from fewmask.data.superpixels import Slic
from fewmask.models import Encoder
from fewmask.models.vit import Vit, as_map
from fewmask.objective import Objective
from fewmask.pretrain.crops import CropViews
from fewmask.pretrain.patches import enlarge_mask
from fewmask.pretrain.structure import MaskName, build_masks, show_regions
from fewmask.types import Batch, UserError, Views

PREVIEW_SEED = 0


class SimMIM(Objective):
    """SimMIM (Xie et al. 2022): hide large squares, predict raw pixels by one layer, L1 on the masked ones.

    Paper: mask patch 32, ratio 0.6, crop (0.67, 1), head = 1x1 convolution and pixel shuffle from the coarsest map,
    a learnt token in place of a hidden patch of a ViT. Ours, for a CNN: hidden pixels take a learnt colour, since a
    CNN has no tokens (it starts at the mean colour); the head is the same;
    `vertical_flip` as in MAE; the number of hidden cells is rounded to the nearest (code: up); `mask` may follow
    superpixels as G2LL's do, by mask patches.
    `mask_patch` is in pixels, a multiple of the ViT's patch and a divisor of the image size.
    Raises UserError where it is not, or where the ratio leaves nothing visible or nothing masked.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.6,
        mask_patch: int = 32,
        crop_scale: tuple[float, float] = (0.67, 1.0),
        vertical_flip: bool = True,
        mask: MaskName = "random",
        focal_share: float = 0.7,
        num_segments: int = 8,
    ) -> None:
        check_mask_patch(mask_patch, encoder)
        super().__init__()
        self.encoder = encoder
        self.mask_patch = mask_patch
        self.crop_scale = crop_scale
        self.vertical_flip = vertical_flip
        num_cells = (encoder.size // mask_patch) ** 2
        self.masking, self.superpixels = build_masks(mask, num_cells, mask_ratio, focal_share, num_segments)
        self.filler = nn.Parameter(torch.zeros(encoder.dim if isinstance(encoder, Vit) else 3))
        stride = encoder.strides[-1]
        self.head = nn.Sequential(nn.Conv2d(encoder.channels[-1], stride**2 * 3, 1), nn.PixelShuffle(stride))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the mean absolute error on the masked pixels."""
        mask = self.masking(batch)
        error = (self.reconstruct(batch.image, mask).float() - batch.image).abs()
        hidden = enlarge_mask(mask, self.mask_patch)
        num_values = len(mask) * 3 * self.masking.num_masked * self.mask_patch**2
        return {"loss": (error * hidden).sum() / num_values}

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return a predicted image (b, 3, s, s) from what the mask (b, cells) leaves visible."""
        if isinstance(self.encoder, Vit):
            return self.head(self.masked_tokens(self.encoder, image, mask))
        hidden = enlarge_mask(mask, self.mask_patch)
        return self.head(self.encoder(torch.where(hidden, self.filler.view(1, 3, 1, 1), image))[-1])

    def masked_tokens(self, encoder: Vit, image: Tensor, mask: Tensor) -> Tensor:
        """Return the map (b, d, h, w) of the last block, the learnt token in place of each hidden patch."""
        hidden = enlarge_mask(mask, self.mask_patch // encoder.patch).flatten(2).transpose(1, 2)
        patches = encoder.embed(image)
        patches = torch.where(hidden, self.filler.to(patches.dtype), patches)
        tokens = encoder.encode(encoder.enter(patches, encoder.grid, encoder.grid))
        return as_map(tokens[:, 1:], encoder.grid, encoder.grid)

    def maps(self) -> dict[str, Slic]:
        """Return the superpixels its masks follow, none for random ones."""
        return self.superpixels

    def product(self) -> Encoder:
        """Return the encoder; the head is thrown away."""
        return self.encoder

    def views(self) -> Views:
        """Return random resized crops and flips."""
        return CropViews(self.encoder.size, scale=self.crop_scale, vertical=self.vertical_flip)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "reconstruction", strips of original, its superpixels if any, masked and reconstructed image."""
        mask = self.masking(batch, torch.Generator().manual_seed(PREVIEW_SEED))
        hidden, image = enlarge_mask(mask, self.mask_patch), batch.image
        painted = torch.where(hidden, self.reconstruct(image, mask).float(), image)
        shown = [denormalise(x) for x in (image, image.masked_fill(hidden, 0.0), painted)]
        return {"reconstruction": torch.cat(show_regions(shown, batch), dim=3).clamp(0, 1)}


def check_mask_patch(mask_patch: int, encoder: Encoder) -> None:
    """Raise a UserError unless whole mask patches tile the image and, for a ViT, whole patches tile a mask patch."""
    if mask_patch < 1 or encoder.size % mask_patch:
        raise UserError(
            f"Setting 'mask_patch' = {mask_patch} does not divide the image size {encoder.size}: choose a divisor."
        )
    if isinstance(encoder, Vit) and mask_patch % encoder.patch:
        raise UserError(
            f"Setting 'mask_patch' = {mask_patch} is not a multiple of {encoder.patch}, the patch of the encoder "
            f"'{encoder.name}': choose a multiple."
        )

"""Masked autoencoder: see a quarter of the patches, paint the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from fewmask.data.preprocess import denormalise
from fewmask.data.superpixels import Slic
from fewmask.models import Encoder
from fewmask.models.vit import Vit
from fewmask.objective import Objective
from fewmask.pretrain.crops import CropViews
from fewmask.pretrain.masking import split_indices
from fewmask.pretrain.patch_decoder import decoder_for
from fewmask.pretrain.patches import patchify, take, unpatchify
from fewmask.pretrain.structure import MaskName, build_masks, show_regions
from fewmask.types import Batch, UserError, Views

PREVIEW_SEED = 0


class MAE(Objective):
    """MAE (He et al. 2022) as the student of G2LL uses it (ISBI 2023, equation 3).

    The encoder sees the visible patches only; a light decoder predicts the pixels of the masked ones; the loss is the
    squared error averaged over masked patches and their pixels. Paper (MAE): ratio 0.75, crop (0.2, 1) and flip,
    decoder sine-cosine positions, `norm_pix` (off in G2LL's equation, on in MAE's best rows). Paper (G2LL): decoder of
    2 blocks, 384 wide, 6 heads on ViT-S, where MAE's own is 8 blocks of 512. Ours: the decoder's width and heads are
    the encoder's unless told, as they are there; pixels are those of the normalised image; `vertical_flip` adds the
    other mirror axis, which pictures of skin allow and radiographs do not; the recipe clips gradients at a norm of 3,
    which MAE's training does not. `mask` may follow superpixels as in G2LL's table 2.
    Raises UserError for an encoder that is no ViT or a ratio that leaves nothing visible or nothing masked.
    """

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        vertical_flip: bool = True,
        mask: MaskName = "random",
        focal_share: float = 0.7,
        num_segments: int = 8,
    ) -> None:
        if not isinstance(encoder, Vit):
            raise UserError(
                f"The method 'mae' needs a ViT encoder, but '{encoder.name}' is a {encoder.kind}: choose an encoder "
                "such as vit_small_patch16, or the method 'simmim'."
            )
        super().__init__()
        self.encoder = encoder
        self.masking, self.superpixels = build_masks(mask, encoder.num_patches, mask_ratio, focal_share, num_segments)
        self.decoder = decoder_for(encoder, decoder_dim, decoder_depth, decoder_heads)
        self.norm_pix = norm_pix
        self.crop_scale = crop_scale
        self.vertical_flip = vertical_flip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the mean squared error on the masked patches."""
        visible, masked = split_indices(self.masking(batch), self.masking.num_masked)
        prediction = self.predict(batch.image, visible, masked)
        return {"loss": (prediction.float() - self.target(batch.image, masked)).square().mean()}

    def predict(self, image: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the predicted pixels (b, m, patch * patch * 3) of the masked patches."""
        return self.decoder(self.encoder.tokens(image, visible), visible, masked)

    def target(self, image: Tensor, masked: Tensor) -> Tensor:
        """Return the pixels (b, m, patch * patch * 3) to predict, standardised per patch if `norm_pix`."""
        pixels = take(patchify(image, self.encoder.patch), masked)
        if not self.norm_pix:
            return pixels
        mean, std = patch_statistics(pixels)
        return (pixels - mean) / std

    def maps(self) -> dict[str, Slic]:
        """Return the superpixels its masks follow, none for random ones."""
        return self.superpixels

    def product(self) -> Encoder:
        """Return the encoder; the decoder is thrown away."""
        return self.encoder

    def views(self) -> Views:
        """Return random resized crops and flips."""
        return CropViews(self.encoder.size, scale=self.crop_scale, vertical=self.vertical_flip)

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "reconstruction", strips of original, its superpixels if any, masked and reconstructed image."""
        patch = self.encoder.patch
        mask = self.masking(batch, torch.Generator().manual_seed(PREVIEW_SEED))
        visible, masked = split_indices(mask, self.masking.num_masked)
        prediction = self.predict(batch.image, visible, masked).float()
        pixels = patchify(batch.image, patch)
        if self.norm_pix:
            mean, std = patch_statistics(take(pixels, masked))
            prediction = prediction * std + mean
        where = masked[..., None].expand_as(prediction)
        shown = [pixels, pixels.masked_fill(mask[..., None], 0.0), pixels.scatter(1, where, prediction)]
        strip = show_regions([denormalise(unpatchify(p, patch)) for p in shown], batch)
        return {"reconstruction": torch.cat(strip, dim=3).clamp(0, 1)}


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (b, m, 1) of each patch, the latter kept away from zero (code: MAE)."""
    return pixels.mean(2, keepdim=True), (pixels.var(2, keepdim=True) + 1e-6).sqrt()

"""Vision transformers that can run on any subset of their patches."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fewmask.models.attention import Attention, finish, project
from fewmask.models.drop_path import share_drop_paths
from fewmask.models.encoder import Encoder, check_divisible
from fewmask.types import UserError


class VitShape(NamedTuple):
    """Patch side in pixels, width of a token, number of attention heads, number of blocks."""

    patch: int
    dim: int
    heads: int
    depth: int = 12


VIT_SHAPES = {
    "vit_micro_patch8": VitShape(8, 128, 4, 6),  # ours: a quarter of ViT-Tiny, for pre-training on a few cores
    "vit_tiny_patch16": VitShape(16, 192, 3),
    "vit_tiny_patch8": VitShape(8, 192, 3),
    "vit_small_patch16": VitShape(16, 384, 6),
    "vit_small_patch8": VitShape(8, 384, 6),
}


class Vit(Encoder):
    """A ViT (Dosovitskiy et al. 2021) of timm with a class token, whose blocks may see the visible patches only.

    The position embedding is learnt and starts as the sine-cosine code of MAE (our choice: small sets leave little
    time to learn it from noise). All else starts as timm has it, as in DINO: linear layers with a std of 0.02, where
    MAE's are two to four times as long in the smallest network here; ten minutes of MAE on it led to the same Dice
    from either (LOG.md). `size` is a multiple of the patch; an image of another multiple gets a resampled
    position embedding. `out_blocks` are the blocks, counted from 1, whose outputs are the features, all at the
    stride of the patch and all through the last LayerNorm; one at the end of each
    quarter of the depth by default. Raises UserError for a size or block that does not exist.
    """

    kind: Literal["vit"] = "vit"

    def __init__(self, name: str, size: int, drop_path: float = 0.0, out_blocks: tuple[int, ...] | None = None) -> None:
        shape = VIT_SHAPES[name]
        check_divisible(size, shape.patch, name)
        if out_blocks is None:
            out_blocks = tuple(math.ceil(shape.depth * quarter / 4) for quarter in (1, 2, 3, 4))
        check_blocks(out_blocks, shape.depth)
        if not 0 <= drop_path < 1:
            raise UserError(
                f"Setting 'model.encoder_settings.drop_path' is a probability below 1 and cannot be {drop_path}."
            )
        super().__init__(name, size, {"drop_path": drop_path, "out_blocks": list(out_blocks)})
        self.patch, self.dim, self.heads, self.out_blocks = shape.patch, shape.dim, shape.heads, tuple(out_blocks)
        self.strides, self.channels = (shape.patch,) * len(out_blocks), (shape.dim,) * len(out_blocks)
        self.body: Any = VisionTransformer(
            img_size=size, patch_size=shape.patch, embed_dim=shape.dim, depth=shape.depth, num_heads=shape.heads,
            num_classes=0, global_pool="", drop_path_rate=drop_path, attn_layer=Attention,
        )  # fmt: skip
        share_drop_paths(self.body)
        assert self.body.pos_embed is not None
        with torch.no_grad():
            self.body.pos_embed[:, 1:].copy_(sine_cosine(self.grid, shape.dim))

    @property
    def grid(self) -> int:
        """Number of patches along a side of an image of the size this encoder was built for."""
        return self.size // self.patch

    @property
    def num_patches(self) -> int:
        """Number of patches of an image of the size this encoder was built for."""
        return self.grid**2

    def embed(self, image: Tensor) -> Tensor:
        """Return the patch embeddings (b, n, d) of an image (b, 3, s, s), without their positions."""
        check_divisible(image.shape[-1], self.patch, self.name)
        check_divisible(image.shape[-2], self.patch, self.name)
        projected = self.body.patch_embed.proj(self.input_affine(image))
        return projected.flatten(2).transpose(1, 2)

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding (1, 1 + height * width, d), class token first, resampled where it must be."""
        if (height, width) == (self.grid, self.grid):
            return self.body.pos_embed
        return resample_abs_pos_embed(self.body.pos_embed, [height, width], [self.grid, self.grid])

    def enter(self, patches: Tensor, height: int, width: int, keep: Tensor | None = None) -> Tensor:
        """Return what the first block reads: the class token and the kept patches with positions, (b, 1 + k, d).

        `patches` (b, height * width, d) come from `embed`; `keep` (b, k) are indices of patches, all of them if None.
        """
        positions = self.positions(height, width)
        patches = patches + positions[:, 1:]
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, self.dim))
        class_token = (self.body.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([class_token, patches], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the normalised output of the last block (b, 1 + k, d) for the output of `enter`."""
        for block in self.body.blocks:
            tokens = block(tokens)
        return self.body.norm(tokens)

    def tokens(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the class token and the kept patches' tokens (b, 1 + k, d); blocks run on the kept patches only."""
        height, width = image.shape[-2] // self.patch, image.shape[-1] // self.patch
        return self.encode(self.enter(self.embed(image), height, width, keep))

    def global_feature(self, image: Tensor) -> Tensor:
        """Return the class token `tokens(image)[:, 0]` (b, d).

        Ours, for speed and without a difference: what the last block would make of the patches is left out, ten of
        twelve parts of its products, a seventh of all with 6 blocks and a fourteenth with 12.
        """
        x = self.enter(self.embed(image), image.shape[-2] // self.patch, image.shape[-1] // self.patch)
        *blocks, last = self.body.blocks
        for block in blocks:
            x = block(x)
        return self.body.norm(finish(last, x, project(last, x), slice(1)))[:, 0]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one map (b, d, s / patch, s / patch) per entry of `out_blocks`."""
        height, width = image.shape[-2] // self.patch, image.shape[-1] // self.patch
        tokens, features = self.enter(self.embed(image), height, width), []
        for number, block in enumerate(self.body.blocks, start=1):
            tokens = block(tokens)
            if number in self.out_blocks:
                features.append(as_map(self.body.norm(tokens)[:, 1:], height, width))
        return features


def as_map(patches: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (b, height * width, d) as a map (b, d, height, width)."""
    return patches.transpose(1, 2).unflatten(2, (height, width))


def check_blocks(out_blocks: tuple[int, ...], depth: int) -> None:
    """Raise a UserError unless the blocks are rising numbers from 1 to the depth."""
    if not out_blocks or sorted(set(out_blocks)) != list(out_blocks) or out_blocks[0] < 1 or out_blocks[-1] > depth:
        raise UserError(
            f"Setting 'model.encoder_settings.out_blocks' must be rising block numbers between 1 and {depth}, "
            f"and cannot be {list(out_blocks)}."
        )


def sine_cosine(grid: int, dim: int) -> Tensor:
    """Return the two-dimensional sine-cosine code (grid * grid, dim) of MAE (He et al. 2022); dim a multiple of 4.

    A quarter of the width each for sine and cosine of the column, then of the row, at wavelengths from 2 pi to
    10000 * 2 pi.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, dim).float()

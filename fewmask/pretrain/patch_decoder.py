"""The light transformer that turns visible tokens into the pixels of the masked patches."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fewmask.models.attention import Attention, finish, project
from fewmask.models.vit import Vit, sine_cosine
from fewmask.pretrain.patches import take
from fewmask.types import UserError


class PatchDecoder(nn.Module):
    """The decoder of MAE (He et al. 2022): a mask token stands for each hidden patch, positions are fixed sine-cosine.

    The visible tokens come first and the mask tokens after them, whatever their place in the image: attention does
    not mind the order, and nothing has to be shuffled back. Ours, for speed and without a difference: the first block
    projects the mask tokens, which are the same in all images, once for a batch; the last block runs for the mask
    tokens only, as the visible ones are not read after it.
    """

    def __init__(self, encoder_dim: int, grid: int, patch: int, dim: int, depth: int, heads: int) -> None:
        check_decoder(dim, depth, heads)
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_cosine(grid, dim)[None], persistent=False)
        self.positions: Tensor
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, attn_layer=Attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch * patch * 3)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the predicted pixels (b, m, patch * patch * 3) of the masked patches.

        `tokens` (b, 1 + k, d) are the encoder's, class token first; `visible` (b, k) and `masked` (b, m) are indices.
        """
        embedded = self.embed(tokens)
        known = embedded[:, 1:] + take(self.positions.expand(len(tokens), -1, -1), visible)
        known = torch.cat([embedded[:, :1], known], dim=1)
        unknown = (self.mask_token + self.positions).to(known.dtype)
        block, *others = self.blocks
        x = append_taken(known, unknown, masked)
        projected = append_taken(project(block, known), project(block, unknown), masked)
        for following in others:
            x = finish(block, x, projected)
            block, projected = following, project(following, x)
        return self.head(self.norm(finish(block, x, projected, slice(-masked.shape[1], None))))


def decoder_for(encoder: Vit, dim: int | None, depth: int, heads: int | None) -> PatchDecoder:
    """Return a decoder for an encoder, with its width and number of heads where `dim` and `heads` are None.

    Paper (G2LL): 384 and 6, which are those of its encoder, ViT-S. Raises UserError for a shape that cannot be.
    """
    dim, heads = encoder.dim if dim is None else dim, encoder.heads if heads is None else heads
    return PatchDecoder(encoder.dim, encoder.grid, encoder.patch, dim, depth, heads)


def append_taken(rows: Tensor, shared: Tensor, index: Tensor) -> Tensor:
    """Return `rows` (b, k, d) followed by the rows of `shared` (1, n, d) at the indices (b, m): (b, k + m, d)."""
    return torch.cat([rows, take(shared.expand(len(rows), -1, -1), index)], dim=1)


def check_decoder(dim: int, depth: int, heads: int) -> None:
    """Raise a UserError unless the heads and the position code divide the width."""
    if depth < 1 or heads < 1 or dim < 4 or dim % heads or dim % 4:
        raise UserError(
            f"A decoder {dim} wide with {depth} blocks of {heads} heads cannot be built: decoder_dim must be a "
            "multiple of 4 and of decoder_heads, and decoder_depth at least 1."
        )


def initialise(module: nn.Module) -> None:
    """Initialise a linear layer as MAE does: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

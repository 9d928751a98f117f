"""Self-attention for vision transformers, by matrix products where torch's fused kernel is slow."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor
from torch.nn import functional as F


class Attention(TimmAttention):
    """timm's multi-head self-attention (the same weights, the same function) that chooses how to compute it.

    For layers without gate, normalised queries or dropout of the attention: no network here has them.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the mixed tokens (b, n, d) of tokens (b, n, d)."""
        if attn_mask is not None or is_causal or not products_are_faster(x):
            return super().forward(x, attn_mask, is_causal)
        query, key, value = self.qkv(x).chunk(3, dim=2)
        return self.proj_drop(self.proj(self.norm(attend(query, key, value, self.num_heads))))


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d / num_heads)) v (b, m, d) of `query` (b, m, d) and `key`, `value` (b, n, d).

    The heads lie side by side in d (Vaswani et al. 2017, equation 1 and section 3.2.2).
    """
    q, k, v = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    if products_are_faster(query):
        mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def project(block: Any, x: Tensor) -> Tensor:
    """Return a block's queries, keys and values side by side, (b, n, 3 d), of tokens (b, n, d)."""
    return block.attn.qkv(block.norm1(x))


def finish(block: Any, x: Tensor, projected: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return `block(x)[:, rows]` (b, m, d) of tokens (b, n, d) without computing its other rows.

    `block` is timm's, its attention as `Attention` says; `projected` is what `project` returns for all tokens.
    """
    query, key, value = projected.chunk(3, dim=2)
    mixed = block.attn.proj(attend(query[:, rows], key, value, block.attn.num_heads))
    x = x[:, rows] + block.drop_path1(block.ls1(mixed))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def products_are_faster(x: Tensor) -> bool:
    """Return whether attention that will be differentiated had better be written as matrix products.

    Measured (torch 2.15, one core with AMX, bf16 autocast, 257 tokens): the fused kernel takes 16 ms forward and 111 ms
    backward, the products 22 and 33. In fp32, without gradient, and on accelerators the fused kernel is no slower. The
    products round the logits to bf16, as all training in bf16 did before there were fused kernels.
    """
    on_cpu = x.device.type == "cpu" and torch.is_grad_enabled()
    return on_cpu and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16

"""Attention is the equation, however it is computed; the fused kernel stays where it is fast."""

from __future__ import annotations

import pytest
import torch
from timm.layers.attention import Attention as TimmAttention

from fewmask.models.attention import Attention, attend, products_are_faster


def literal(query, key, value, num_heads):
    """Vaswani et al. 2017, equation 1, one image, head and query at a time."""
    width, rows = query.shape[2] // num_heads, []
    for q, k, v in zip(query, key, value, strict=True):
        out = torch.zeros_like(q)
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(q)):
                weights = torch.stack([(q[i, part] * k[j, part]).sum() for j in range(len(k))]) / width**0.5
                out[i, part] = weights.softmax(0) @ v[:, part]
        rows.append(out)
    return torch.stack(rows)


def tokens(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape)


def under_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_attend_equals_the_equation_for_fewer_queries_than_keys():
    query, key, value = tokens(2, 3, 8), tokens(2, 5, 8) + 1, tokens(2, 5, 8)
    torch.testing.assert_close(attend(query, key, value, 2), literal(query, key, value, 2))


def test_both_ways_agree_in_value_and_gradient():
    x, ours, theirs = tokens(2, 9, 32), Attention(32, 4, qkv_bias=True), TimmAttention(32, 4, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, theirs):
        with under_bf16():
            out = layer(x).float()
        out.square().sum().backward()
        found.append([out.detach(), layer.qkv.weight.grad, layer.proj.weight.grad])
    for own, fused in zip(*found, strict=True):
        assert float((own - fused).norm() / fused.norm()) < 0.02


def test_in_fp32_it_is_timms_to_the_bit():
    x, ours, theirs = tokens(2, 9, 32), Attention(32, 4), TimmAttention(32, 4)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("bf16", "grad", "expected"), [(True, True, True), (True, False, False), (False, True, False)])
def test_products_only_where_a_gradient_is_taken_in_bf16(bf16, grad, expected):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.set_grad_enabled(grad):
        assert products_are_faster(torch.zeros(1)) is expected

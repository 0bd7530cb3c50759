"""Attention written from the formulas, for comparison: the source's, X-EcoMLA's as published, and MLA from its factors.

Float64, one sequence [T, hidden], causal, un-batched; nothing of the package is used but its data classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.modeling.layer_xeco import MlaShape

THETA = 100.0


def angles(num_tokens: int, frequencies: Tensor) -> Tensor:
    return torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies


def fresh_frequencies(width: int) -> Tensor:
    """THETA^(-2i / width) for i < width / 2."""
    return THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotate_half_split(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs (i, i + width/2) of x [T, ..., width] turned by `turn` [T, width/2]."""
    turn = turn.view(turn.shape[0], *[1] * (x.dim() - 2), -1)
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()], dim=-1)


def rotate_interleaved(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of x [T, ..., width] turned by `turn` [T, width/2], as complex numbers."""
    turn = turn.view(turn.shape[0], *[1] * (x.dim() - 2), -1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(turn), turn)
    return torch.view_as_real(turned).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k [T, H, d], v [T, H, V] -> [T, H·V]."""
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(diagonal=1)
    shares = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("hts,shv->thv", shares, v).flatten(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.double().T
    return y if bias is None else y + bias.double()


def source_output(source: SourceAttention, x: Tensor) -> Tensor:
    """Grouped attention as transformers' Llama computes it."""
    q = linear(x, source.q_weight, source.q_bias).unflatten(-1, (source.num_attention_heads, -1))
    k = linear(x, source.k_weight, source.k_bias).unflatten(-1, (source.num_key_value_heads, -1))
    v = linear(x, source.v_weight, source.v_bias).unflatten(-1, (source.num_key_value_heads, -1))
    turn = angles(x.shape[0], fresh_frequencies(source.head_dim))
    q, k = rotate_half_split(q, turn), rotate_half_split(k, turn)
    k, v = (t.repeat_interleave(source.num_attention_heads // source.num_key_value_heads, dim=1) for t in (k, v))
    return linear(attend(q, k, v, source.head_dim**-0.5), source.o_weight, source.o_bias)


def mla_output(factors: MlaAttention, shape: MlaShape, x: Tensor, *, head_dim: int) -> Tensor:
    """MLA from its factors; the scale is the source's. A latent norm is left out."""
    heads, nope, rope = shape.num_attention_heads, shape.qk_nope_head_dim, shape.qk_rope_head_dim
    if factors.q_weight is not None:
        q = linear(x, factors.q_weight, factors.q_bias)
    else:
        q = linear(x @ factors.q_a_weight.double().T, factors.q_b_weight, factors.q_bias)
    q_nope, q_rope = q.unflatten(-1, (heads, nope + rope)).split([nope, rope], dim=-1)
    latent, k_rope = linear(x, factors.kv_a_weight, factors.kv_a_bias).split([shape.kv_lora_rank, rope], dim=-1)
    up = linear(latent, factors.kv_b_weight, factors.kv_b_bias).unflatten(-1, (heads, -1))
    k_nope, v = up.split([nope, shape.v_head_dim], dim=-1)
    frequencies = fresh_frequencies(rope)
    if shape.rope_index is not None:
        frequencies = fresh_frequencies(head_dim)[list(shape.rope_index)]
    turn = angles(x.shape[0], frequencies)
    k_rope = rotate_half_split(k_rope, turn)[:, None].expand(-1, heads, -1)
    q = torch.cat([q_nope, rotate_half_split(q_rope, turn)], dim=-1)
    k = torch.cat([k_nope, k_rope], dim=-1)
    return linear(attend(q, k, v, head_dim**-0.5), factors.o_weight, factors.o_bias)


def repeated_matrix(source: SourceAttention) -> Tensor:
    """The published matrix: keys, then values, repeated to all query heads [2·H·d, hidden]."""
    times = source.num_attention_heads // source.num_key_value_heads
    blocks = []
    for weight in (source.k_weight, source.v_weight):
        groups = weight.double().unflatten(0, (source.num_key_value_heads, source.head_dim))
        blocks.append(torch.stack([groups[head // times] for head in range(source.num_attention_heads)]))
    return torch.cat(blocks).flatten(0, 1)


def published_key_value_maps(source: SourceAttention, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(down [R, hidden], key up [H, d, R], value up [H, d, R]) from one full SVD of the repeated matrix."""
    u, s, vh = torch.linalg.svd(repeated_matrix(source), full_matrices=False)
    keys, values = u[:, :rank].view(2, source.num_attention_heads, source.head_dim, rank)
    return s[:rank, None] * vh[:rank], keys, values


def published_output(
    source: SourceAttention, x: Tensor, *, rank: int, rope_dim: int, nope_dim: int, q_rank: int | None = None
) -> Tensor:
    """X-EcoMLA's attention at step 0: interleaved pairs of rows stored half-split, fresh frequencies. Biases, which the
    paper's models lack, stay with the rows that they belong to."""
    heads, dim = source.num_attention_heads, source.head_dim
    times = heads // source.num_key_value_heads
    down, key_up, value_up = published_key_value_maps(source, rank)
    latent = x @ down.T
    k_nope = torch.einsum("tr,hdr->thd", latent, key_up[:, :nope_dim])
    v = torch.einsum("tr,hdr->thd", latent, value_up)
    k_full = linear(x, source.k_weight, source.k_bias).unflatten(-1, (-1, dim))
    k_rope = k_full[:, :, dim - rope_dim :].mean(dim=1, keepdim=True)
    for bias, target in ((source.k_bias, k_nope), (source.v_bias, v)):
        if bias is not None:
            per_head = bias.double().view(-1, dim).repeat_interleave(times, dim=0)
            target.add_(per_head[:, : target.shape[-1]])
    q_weight = source.q_weight.double()
    if q_rank is not None:
        u, s, vh = torch.linalg.svd(q_weight, full_matrices=False)
        q_weight = (u[:, :q_rank] * s[:q_rank]) @ vh[:q_rank]
    q = linear(x, q_weight, source.q_bias).unflatten(-1, (heads, dim))
    turn = angles(x.shape[0], fresh_frequencies(rope_dim))
    q_rope = rotate_interleaved(q[..., dim - rope_dim :], turn)
    k_rope = rotate_interleaved(k_rope, turn).expand(-1, heads, -1)
    queries, keys = torch.cat([q[..., :nope_dim], q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
    return linear(attend(queries, keys, v, dim**-0.5), source.o_weight, source.o_bias)

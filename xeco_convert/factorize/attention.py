"""Attention of one layer on whole windows, in plain torch: the source's and its MLA form's, for statistics and regression.

Letters: W windows, T tokens, X hidden_size, H heads, G groups, d head_dim, N qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim, R kv_lora_rank. cos and sin [1 or W, T, d] are the source's tables (half-split, the second half repeats the
first; 1 and 0 for pairs that are not rotated), mask [1, 1, T, T] boolean (True attends), softmax_scale the source's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.factorize.layer_weights import MlaAttention, SourceAttention
from xeco_convert.ops.choice import MAX_RANK, MAX_ROPE
from xeco_convert.ops.fused import Ranges, fused_attention, kernel_obstacle, ranges_of
from xeco_convert.ops.packed_rows import as_cached


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """What an attention layer is called with beside its input, the same for all windows."""

    cos: Tensor
    sin: Tensor
    mask: Tensor
    softmax_scale: float
    norm_eps: float = 1e-6
    logit_softcap: float | None = None
    # tables [1 or W, T, P] of an MLA layer with rotary frequencies of its own (rope_index None)
    own_cos: Tensor | None = None
    own_sin: Tensor | None = None

    def mla_tables(self, mla: MlaAttention) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or W, T, P] of an MLA layer: columns of the source's, or the layer's own."""
        if mla.rope_index is None and mla.qk_rope_head_dim:
            if self.own_cos is None or self.own_sin is None:
                raise ValueError("an MLA layer without rope_index needs rotary tables of its own")
            return self.own_cos, self.own_sin
        columns = torch.tensor((mla.rope_index or ()) * 2, device=self.cos.device, dtype=torch.int64)
        return self.cos[..., columns], self.sin[..., columns]


def source_projections(source: SourceAttention, x_WTX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [W, T, H, d], keys and values [W, T, G, d] before rotation (normalised where the source does so), in the dtype
    of the weights."""
    queries = normalised(
        functional.linear(x_WTX, source.q_weight, source.q_bias), source.q_norm_weight, source.norm_eps, source.head_dim
    )
    keys = normalised(
        functional.linear(x_WTX, source.k_weight, source.k_bias), source.k_norm_weight, source.norm_eps, source.head_dim
    )
    values = functional.linear(x_WTX, source.v_weight, source.v_bias).unflatten(-1, (source.num_key_value_heads, -1))
    return queries, keys, values


def source_probabilities(queries: Tensor, keys: Tensor, context: AttentionContext) -> Tensor:
    """Attention weights [W, H, T, T] from the un-rotated queries [W, T, H, d] and keys [W, T, G, d]."""
    cos, sin = context.cos.unsqueeze(2), context.sin.unsqueeze(2)
    rotated = rotate(keys, cos, sin).repeat_interleave(queries.shape[2] // keys.shape[2], dim=2)
    scores = torch.einsum("wthd,wshd->whts", rotate(queries, cos, sin), rotated) * context.softmax_scale
    return soft_capped(scores, context.logit_softcap).masked_fill(~context.mask, -torch.inf).softmax(dim=-1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, context: AttentionContext) -> Tensor:
    """Attention of [W, H, T, width] queries, keys and values, all heads there."""
    if context.logit_softcap is None:
        causal = bool((context.mask == torch.ones_like(context.mask).tril()).all())
        mask = None if causal else context.mask
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=context.softmax_scale
        )
    scores = soft_capped(queries @ keys.transpose(-1, -2) * context.softmax_scale, context.logit_softcap)
    weights: Tensor = scores.masked_fill(~context.mask, -torch.inf).softmax(dim=-1)
    return weights @ values


def soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap), as Gemma 2 bounds its scores (arXiv 2408.00118); unchanged without a cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def normalised(rows: Tensor, weight: Tensor | None, eps: float, head_dim: int) -> Tensor:
    """Rows [..., H·d] as heads [..., H, d], behind the RMSNorm of `weight` [d] (each head) or [H·d] (all rows), if any."""
    if weight is not None and weight.numel() != head_dim:
        rows = functional.rms_norm(rows, (rows.shape[-1],), weight, eps)
    heads: Tensor = rows.unflatten(-1, (-1, head_dim))  # type: ignore[no-untyped-call]
    if weight is not None and weight.numel() == head_dim:
        heads = functional.rms_norm(heads, (head_dim,), weight, eps)
    return heads


def mla_attended(mla: MlaAttention, num_heads: int, x_WTX: Tensor, context: AttentionContext) -> Tensor:
    """Attended latents [W, T, H, R]: what each head's value up-projection is applied to."""
    rope = mla.qk_rope_head_dim
    queries = mla_queries(mla, num_heads, x_WTX, context)
    q_nope, q_rope = queries.split([queries.shape[-1] - rope, rope], dim=-1)
    c_kv, k_rope, cos, sin = mla_compressed(mla, x_WTX, context)
    w_uk, _ = split_up_projection(mla, num_heads)
    q_latent = torch.einsum("wthn,hnr->wthr", q_nope, w_uk)
    q_rope = rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))
    c_kv, k_rope = as_cached(c_kv, mla.latent_bits), as_cached(rotate(k_rope, cos, sin), mla.rope_bits)
    ranges = _kernel_ranges(c_kv, k_rope, context)
    if ranges is not None:
        scale, dtype = context.softmax_scale, c_kv.dtype
        return fused_attention(q_latent, q_rope, c_kv, k_rope, softmax_scale=scale, dtype=dtype, ranges=ranges)
    query_rows = torch.cat([q_latent, q_rope], dim=-1).transpose(1, 2)
    key_rows = torch.cat([c_kv, k_rope], dim=-1).unsqueeze(1).expand(-1, num_heads, -1, -1)
    out = _attended(query_rows, key_rows, key_rows, context)
    return out.transpose(1, 2)[..., : c_kv.shape[-1]]


def _kernel_ranges(c_kv: Tensor, k_rope: Tensor, context: AttentionContext) -> Ranges | None:
    """The context's mask as the compiled kernels take it, where they serve this call."""
    if context.logit_softcap is not None or not 0 < k_rope.shape[-1] <= MAX_ROPE or c_kv.shape[-1] > MAX_RANK:
        return None
    if kernel_obstacle(c_kv.device.type, c_kv.dtype) is not None:
        return None
    return ranges_of(context.mask)


def mla_compressed(
    mla: MlaAttention, x_WTX: Tensor, context: AttentionContext
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [W, T, R] (behind the latent norm), the shared rotary key [W, T, P] before rotation, and the layer's own
    columns of cos and sin [1 or W, T, P]."""
    rope = mla.qk_rope_head_dim
    compressed = functional.linear(latent_inputs(mla, x_WTX, context), mla.kv_a_weight, mla.kv_a_bias)
    c_kv, k_rope = compressed.split([compressed.shape[-1] - rope, rope], dim=-1)
    if mla.latent_norm_weight is not None:
        c_kv = functional.rms_norm(c_kv, c_kv.shape[-1:], mla.latent_norm_weight, context.norm_eps)
    return c_kv, k_rope, *context.mla_tables(mla)


def latent_inputs(mla: MlaAttention, x_WTX: Tensor, context: AttentionContext) -> Tensor:
    """What the latent and the rotary key are linear in: the layer's input [..., X], or where the source normalises its keys
    κ = (normalised keys, values) of all groups [..., 2·G·d]. Any other map of the input that is not linear belongs here."""
    if mla.k_weight is None or mla.v_weight is None:
        return x_WTX
    assert mla.k_norm_weight is not None
    rows = functional.linear(x_WTX, mla.k_weight, mla.k_bias)
    # a norm over all rows is that of one head as wide as they are
    keys = normalised(rows, mla.k_norm_weight, context.norm_eps, mla.k_norm_weight.numel())
    return torch.cat([keys.flatten(-2), functional.linear(x_WTX, mla.v_weight, mla.v_bias)], dim=-1)


def mla_output(mla: MlaAttention, num_heads: int, x_WTX: Tensor, context: AttentionContext) -> Tensor:
    """Output of the MLA form [W, T, X], o_proj included. Differentiable with respect to the weights."""
    return attended_output(mla, mla_attended(mla, num_heads, x_WTX, context))


def attended_output(mla: MlaAttention, attended_WTHR: Tensor) -> Tensor:
    """Output of the MLA form [W, T, X] from its attended latents."""
    num_heads = attended_WTHR.shape[2]
    _, w_uv = split_up_projection(mla, num_heads)
    values = torch.einsum("wthr,hvr->wthv", attended_WTHR, w_uv)
    if mla.kv_b_bias is not None:
        values = values + mla.kv_b_bias.unflatten(0, (num_heads, -1))[:, -w_uv.shape[1] :]
    return functional.linear(values.flatten(2), mla.o_weight, mla.o_bias)


def split_up_projection(mla: MlaAttention, num_heads: int) -> tuple[Tensor, Tensor]:
    """W_UK [H, N, R] and W_UV [H, V, R]."""
    width = mla.o_weight.shape[1] // num_heads
    rows = mla.kv_b_weight.unflatten(0, (num_heads, -1))
    return rows[:, : rows.shape[1] - width], rows[:, rows.shape[1] - width :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of half-split pairs: x [..., P], cos and sin broadcastable to it."""
    if x.shape[-1] == 0:
        return x
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mla_queries(mla: MlaAttention, num_heads: int, x_WTX: Tensor, context: AttentionContext) -> Tensor:
    """Queries [W, T, H, N+P], not rotated yet."""
    if mla.q_weight is not None:
        rows = functional.linear(x_WTX, mla.q_weight, mla.q_bias)
    else:
        assert mla.q_a_weight is not None and mla.q_b_weight is not None
        rows = functional.linear(functional.linear(x_WTX, mla.q_a_weight), mla.q_b_weight, mla.q_bias)
    if mla.q_head_weight is None:
        heads: Tensor = rows.unflatten(-1, (num_heads, -1))  # type: ignore[no-untyped-call]
        return heads
    heads = normalised(rows, mla.q_norm_weight, context.norm_eps, mla.q_head_weight.shape[1])
    maps: Tensor = mla.q_head_weight.unflatten(0, (num_heads, -1))  # type: ignore[no-untyped-call]
    mapped: Tensor = torch.einsum("wthn,hqn->wthq", heads, maps)
    return mapped

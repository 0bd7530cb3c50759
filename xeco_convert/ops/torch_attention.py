"""Attention of all heads over one shared latent in plain torch: the absorbed form of multi-head latent attention.

This file is also written beside the weights of converted checkpoints, as xeco_latent_attention.py: it imports torch alone,
and defines no op, since a process may load several copies of it.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(softmax_scale · (q_latent · c_kvᵀ + q_rope · k_ropeᵀ)) · c_kv, for every head over the same latents.

    q_latent [B, Q, H, R] = q_nope · W_UK, q_rope [B, Q, H, P] rotated; c_kv [B, T, R] and k_rope [B, T, P] rotated, all of
    one floating dtype and device. attention_mask broadcasts to [B, H, Q, T]: boolean (True attends) or added to the
    scores; without one, query i sees the tokens up to T − Q + i. Returns [B, Q, H, R] in the dtype of the queries; a query
    that may attend to nothing gets zeros. Raises `ValueError` for shapes that do not fit each other.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, with W_UK absorbed into the query and W_UV left outside.
    """
    _check(q_latent, q_rope, c_kv, k_rope)
    queries = torch.cat([q_latent, q_rope], dim=-1)
    rows = torch.cat([c_kv, k_rope], dim=-1).unsqueeze(1)
    num_queries, num_tokens, rank = q_latent.shape[1], c_kv.shape[1], c_kv.shape[-1]
    # Keys double as values (their first R columns are the latent), so all widths agree and torch's fused kernels serve.
    if num_queries == 1:
        # One query token: the heads take the place of the query tokens, and the cache is read once for all of them.
        mask = None if attention_mask is None else _per_head_mask(attention_mask, queries.shape[2])
        out = functional.scaled_dot_product_attention(
            queries, rows, rows, attn_mask=mask, dropout_p=dropout, scale=softmax_scale
        )
        return out[..., :rank]
    causal = attention_mask is None and num_queries == num_tokens
    if attention_mask is None and not causal:
        attention_mask = causal_mask(num_queries, num_tokens, q_latent.device)
    rows = rows.expand(-1, queries.shape[2], -1, -1)
    out = functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        rows,
        rows,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=softmax_scale,
    )
    return out.transpose(1, 2)[..., :rank]


def reference_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, written from the formula: scores and softmax in float32 or better, nothing fused. softcap c bounds scores:
    c · tanh(score / c).

    Returns the output [B, Q, H, R] and the weights [B, H, Q, T], both in the dtype of the queries.
    """
    _check(q_latent, q_rope, c_kv, k_rope)
    scores = torch.einsum("bqhr,btr->bhqt", q_latent, c_kv) + torch.einsum("bqhp,btp->bhqt", q_rope, k_rope)
    weights = _weights(scores, softmax_scale, softcap, attention_mask, dropout).to(q_latent.dtype)
    return torch.einsum("bhqt,btr->bqhr", weights, c_kv), weights


def reference_expanded_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same over keys and values that were expanded for every head, where the up-projection has no weight to absorb.

    queries [B, H, Q, D], keys [B, H, T, D], values [B, H, T, V] -> output [B, Q, H, V] and weights [B, H, Q, T].
    """
    scores = queries @ keys.transpose(-1, -2)
    weights = _weights(scores, softmax_scale, softcap, attention_mask, dropout).to(queries.dtype)
    return (weights @ values).transpose(1, 2), weights


def _weights(
    scores_BHQT: Tensor, softmax_scale: float, softcap: float | None, attention_mask: Tensor | None, dropout: float
) -> Tensor:
    scores_BHQT = scores_BHQT.to(torch.promote_types(scores_BHQT.dtype, torch.float32)) * softmax_scale
    if softcap is not None:
        scores_BHQT = softcap * torch.tanh(scores_BHQT / softcap)
    if attention_mask is None:
        attention_mask = causal_mask(scores_BHQT.shape[2], scores_BHQT.shape[3], scores_BHQT.device)
    if attention_mask.dtype == torch.bool:
        scores_BHQT = scores_BHQT.masked_fill(~attention_mask, -torch.inf)
    else:
        scores_BHQT = scores_BHQT + attention_mask
    # A row of −∞ alone has no softmax: such a query (left padding) attends to nothing.
    nothing = (scores_BHQT == -torch.inf).all(dim=-1, keepdim=True)
    return functional.dropout(scores_BHQT.softmax(dim=-1).masked_fill(nothing, 0.0), p=dropout)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that attention is computed in: autocast's, or what holds the numbers of all inputs."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of half-split pairs (RoFormer, arXiv 2104.09864): x [..., P], cos and sin broadcastable to it."""
    if x.shape[-1] == 0:  # a layer without rotation
        return x
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask(num_queries: int, num_tokens: int, device: torch.device) -> Tensor:
    """Boolean [Q, T]: the last query sees every token, the one before it all but the last, and so on."""
    full = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=device)
    return full.tril(diagonal=num_tokens - num_queries)


def _per_head_mask(attention_mask: Tensor, num_heads: int) -> Tensor:
    """A mask for [B, H, 1, T] scores in the layout [B, 1, H, T], where heads stand in for query tokens."""
    if attention_mask.dim() < 3:  # [T] or [1, T]: the same for every head
        return attention_mask
    mask = attention_mask.transpose(-2, -3)
    return mask.expand(*mask.shape[:-2], num_heads, mask.shape[-1])


def _check(q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> None:
    if q_latent.dim() != 4 or q_rope.dim() != 4 or q_latent.shape[:3] != q_rope.shape[:3]:
        raise ValueError(
            "absorbed_attention: expected q_latent [B, Q, H, R] and q_rope [B, Q, H, P], "
            f"found {tuple(q_latent.shape)} and {tuple(q_rope.shape)}"
        )
    if c_kv.dim() != 3 or k_rope.dim() != 3 or c_kv.shape[:2] != k_rope.shape[:2]:
        raise ValueError(
            "absorbed_attention: expected c_kv [B, T, R] and k_rope [B, T, P], "
            f"found {tuple(c_kv.shape)} and {tuple(k_rope.shape)}"
        )
    if (
        q_latent.shape[0] != c_kv.shape[0]
        or q_latent.shape[-1] != c_kv.shape[-1]
        or q_rope.shape[-1] != k_rope.shape[-1]
    ):
        raise ValueError(
            "absorbed_attention: batch, rank or rope widths differ between queries and cache: "
            f"{tuple(q_latent.shape)}, {tuple(q_rope.shape)}, {tuple(c_kv.shape)}, {tuple(k_rope.shape)}"
        )

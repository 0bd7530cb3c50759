"""X-EcoMLA's initialisation as published (arXiv 2503.11132, section 3.2, and its authors' code), for reproduction.

Keys and values are factorised together by one SVD of the weights. The shared rotary key is the mean over groups of the
last rows of W_k, paired (2i, 2i + 1) although the weights are stored half-split, with fresh frequencies: step 0 is far
from the source, which is the published behaviour and documented as such. Letters as in layer_weights.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import LayerErrors, MlaAttention, SourceAttention
from xeco_convert.factorize.svd import LowRank, thin_svd
from xeco_convert.modeling.layer_xeco import MlaShape


def paper_spectrum(source: SourceAttention) -> Tensor:
    """Singular values [min(2·G·d, hidden)] of the joint key/value map, descending: what rank policies look at.

    Those of the published, repeated matrix are √(H/G) times as large: shares of energy are the same.
    """
    matrix = torch.cat([source.k_weight, source.v_weight]).to(torch.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).clamp_min(0).sqrt()


def joint_key_value_factors(source: SourceAttention, rank: int) -> LowRank:
    """Factors of the published matrix, keys and values repeated to H heads and stacked [2·H·d, hidden], cut at `rank`.

    Every row occurs n = H/G times, so with the SVD U·S·Vᵀ of the unrepeated matrix the repeated one has U/√n (rows
    repeated), √n·S and the same V: an n times smaller problem with the same result.
    """
    repeats = source.heads_per_group
    factors = thin_svd(torch.cat([source.k_weight, source.v_weight]), rank)
    left_2GdR = factors.left.view(2, source.num_key_value_heads, source.head_dim, rank)
    repeated = left_2GdR.repeat_interleave(repeats, dim=1).reshape(-1, rank)
    return LowRank(
        left=repeated / math.sqrt(repeats),
        right=factors.right * math.sqrt(repeats),
        singular_values=factors.singular_values * math.sqrt(repeats),
    )


def paper_factors(source: SourceAttention, shape: MlaShape) -> MlaAttention:
    """The published initialisation at `shape` (v_head_dim = head_dim), in float64.

    kv_a = S·Vᵀ and the mean rotary key; kv_b = U, of which the first qk_nope_head_dim rows of each key head and all
    value rows are kept; biases (Qwen2) stay where they are exact: on kv_b for un-rotated keys and values, averaged for the
    rotary key.
    """
    heads, dim = source.num_attention_heads, source.head_dim
    joint = joint_key_value_factors(source, shape.kv_lora_rank)
    keys_HdR, values_HdR = joint.left.view(2, heads, dim, -1)
    kv_b = torch.cat([keys_HdR[:, : shape.qk_nope_head_dim], values_HdR], dim=1)
    q_a, q_b = _query_factors(source, shape)
    return MlaAttention(
        q_weight=q_b if q_a is None else None,
        q_a_weight=q_a,
        q_b_weight=None if q_a is None else q_b,
        kv_a_weight=torch.cat([joint.right, _mean_rotary_rows(source.k_weight, source, shape)]),
        kv_b_weight=kv_b.reshape(-1, shape.kv_lora_rank),
        o_weight=source.o_weight,
        q_bias=None if source.q_bias is None else _split_heads(source.q_bias[:, None].double(), heads, shape)[:, 0],
        kv_a_bias=_kv_a_bias(source, shape),
        kv_b_bias=_kv_b_bias(source, shape),
        o_bias=source.o_bias,
        latent_norm_weight=_latent_rms(joint.right, source) if shape.latent_norm else None,
    )


def paper_errors(source: SourceAttention, factors: MlaAttention, shape: MlaShape) -> LayerErrors:
    """How far the factors are from the source's key map (rotary rows included) and value map, as weights."""
    groups, dim, nope = source.num_key_value_heads, source.head_dim, shape.qk_nope_head_dim
    latent_rows = factors.kv_a_weight[: shape.kv_lora_rank]
    # The heads of a group have the same rows here: one of them stands for all.
    kv_b_HXR = factors.kv_b_weight.view(source.num_attention_heads, nope + dim, -1)
    maps = (kv_b_HXR[:: source.heads_per_group].reshape(groups * (nope + dim), -1) @ latent_rows).view(
        groups, nope + dim, -1
    )
    keys = source.k_weight.to(torch.float64).view(groups, dim, -1)
    rope = _to_interleaved(factors.kv_a_weight[shape.kv_lora_rank :])
    key_square = (maps[:, :nope] - keys[:, :nope]).square().sum() + (rope - keys[:, -rope.shape[0] :]).square().sum()
    # rows of the source that the published shape drops altogether (qk_nope_head_dim + qk_rope_head_dim < head_dim)
    key_square += keys[:, nope : dim - rope.shape[0]].square().sum()
    values = source.v_weight.to(torch.float64).view(groups, dim, -1)
    return LayerErrors(
        key=float((key_square / keys.square().sum()).sqrt()),
        value=float((maps[:, nope:] - values).norm() / values.norm()),
    )


def _query_factors(source: SourceAttention, shape: MlaShape) -> tuple[Tensor | None, Tensor]:
    """(None, q) or (q_a, q_b): the queries, or their SVD at q_lora_rank, heads split as the keys are."""
    heads = source.num_attention_heads
    if shape.q_lora_rank is None:
        return None, _split_heads(source.q_weight, heads, shape)  # rows only move: no arithmetic, no wider dtype
    factors = thin_svd(source.q_weight, shape.q_lora_rank)
    return factors.right, _split_heads(factors.left, heads, shape)


def _split_heads(rows: Tensor, heads: int, shape: MlaShape) -> Tensor:
    """Rows [H·d, X] -> [H·(N+P), X]: the first N rows of each head, then its last P, re-paired."""
    rows_HdX = rows.view(heads, -1, rows.shape[-1])
    rotary = rows_HdX[:, rows_HdX.shape[1] - shape.qk_rope_head_dim :]
    rotary = torch.cat([rotary[:, 0::2], rotary[:, 1::2]], dim=1)
    return torch.cat([rows_HdX[:, : shape.qk_nope_head_dim], rotary], dim=1).reshape(-1, rows.shape[-1])


def _mean_rotary_rows(rows: Tensor, source: SourceAttention, shape: MlaShape) -> Tensor:
    """Mean over groups of the last P rows [P, X], moved from the published pairs (2i, 2i + 1) to half-split order."""
    rows_GdX = rows.to(torch.float64).view(source.num_key_value_heads, source.head_dim, -1)
    mean = rows_GdX[:, source.head_dim - shape.qk_rope_head_dim :].mean(dim=0)
    return torch.cat([mean[0::2], mean[1::2]])


def _to_interleaved(rows: Tensor) -> Tensor:
    """Half-split rows [P, X] back in the order of the source's rows."""
    return torch.stack(rows.chunk(2), dim=1).reshape(rows.shape)


def _per_head(rows: Tensor, source: SourceAttention) -> Tensor:
    """Rows [G·d, X] of groups as [H, d, X] of heads, float64."""
    grouped = rows.to(torch.float64).view(source.num_key_value_heads, source.head_dim, -1)
    return grouped.repeat_interleave(source.heads_per_group, dim=0)


def _kv_a_bias(source: SourceAttention, shape: MlaShape) -> Tensor | None:
    if source.k_bias is None:
        return None
    rope = _mean_rotary_rows(source.k_bias[:, None], source, shape)[:, 0]
    return torch.cat([rope.new_zeros(shape.kv_lora_rank), rope])


def _kv_b_bias(source: SourceAttention, shape: MlaShape) -> Tensor | None:
    if source.k_bias is None or source.v_bias is None:
        return None
    keys, values = _per_head(source.k_bias[:, None], source), _per_head(source.v_bias[:, None], source)
    return torch.cat([keys[:, : shape.qk_nope_head_dim], values], dim=1).reshape(-1)


def _latent_rms(right: Tensor, source: SourceAttention) -> Tensor:
    """Weight [R] that makes the latent's RMSNorm nearly neutral: the latent's own expected rms (not its inverse).

    Without data the norm's output is taken as uncorrelated with unit variance times the norm weight γ, so
    E[c_r²] = Σ_j right_rj² γ_j².
    """
    gamma = source.input_norm_weight.to(torch.float64)
    rms = (right.square() @ gamma.square()).mean().sqrt()
    return rms.expand(right.shape[0]).clone()

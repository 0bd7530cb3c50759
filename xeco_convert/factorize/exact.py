"""A source layer written as MLA without any approximation: what every other form is checked against.

Letters as in layer_weights.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import MlaAttention, SourceAttention
from xeco_convert.modeling.layer_xeco import MlaShape


def exact_shape(source: SourceAttention) -> MlaShape:
    """Shape at which MLA holds the source's attention exactly: every rotary row of every group as shared rotary key, the
    other key rows and the values as latent."""
    groups, pairs = source.num_key_value_heads, source.rotated
    return MlaShape(
        num_attention_heads=source.num_attention_heads,
        hidden_size=source.q_weight.shape[1],
        kv_lora_rank=groups * (2 * source.head_dim - 2 * pairs),
        qk_nope_head_dim=source.head_dim,
        qk_rope_head_dim=groups * 2 * pairs,
        v_head_dim=source.head_dim,
        rope_index=tuple(range(pairs)) * groups,
        biases=_exact_biases(source),
        q_norm=source.q_norm,
        k_norm=source.k_norm,
        logit_softcap=source.logit_softcap,
        num_key_value_heads=0 if source.k_norm is None else groups,
    )


def _exact_biases(source: SourceAttention) -> tuple[str, ...]:
    keys, values = ("kv_a", "kv_b") if source.k_norm is None else ("k", "v")
    present = {"q": source.q_bias, keys: source.k_bias, values: source.v_bias, "o": source.o_bias}
    return tuple(name for name, bias in present.items() if bias is not None)


def exact_factors(source: SourceAttention) -> MlaAttention:
    """The source itself written as MLA, at `exact_shape`: the check that layout, scaling and biases are understood.

    The shared rotary key holds the rotary rows of all groups side by side, each head reads its own group's part; the latent
    is the values, then the keys' rows that are not rotated. Same dtype as the source, no arithmetic on the weights: any
    difference of outputs is rounding. Normalised keys stay the source's own, and the latent and rotary key read them.
    """
    if source.k_norm_weight is not None:
        return _exact_behind_norm(source)
    static, k_rope = _split_keys(source.k_weight, source)
    k_bias = None
    if source.k_bias is not None:
        parts = [part[:, 0] for part in _split_keys(source.k_bias[:, None], source)]
        k_bias = torch.cat([parts[0].new_zeros(source.v_weight.shape[0]), *parts])
    kv_b_HUR = torch.cat(_exact_up_projections(source), dim=1)
    queries, head_map, q_bias = source.q_weight, None, source.q_bias
    if source.q_norm_weight is None:
        queries = _exact_queries(queries, source)
        q_bias = None if q_bias is None else _exact_queries(q_bias[:, None], source)[:, 0]
    else:
        identity = torch.eye(source.head_dim, dtype=queries.dtype, device=queries.device)
        head_map = _exact_queries(identity.repeat(source.num_attention_heads, 1), source)
    return MlaAttention(
        q_weight=queries,
        kv_a_weight=torch.cat([source.v_weight, static, k_rope]),
        kv_b_weight=kv_b_HUR.flatten(0, 1),
        o_weight=source.o_weight,
        q_bias=q_bias,
        kv_a_bias=k_bias,
        kv_b_bias=_exact_value_bias(source),
        o_bias=source.o_bias,
        q_norm_weight=source.q_norm_weight,
        q_head_weight=head_map,
        rope_index=exact_shape(source).rope_index,
    )


def _exact_behind_norm(source: SourceAttention) -> MlaAttention:
    """`exact_factors` of a layer that normalises its keys: those of the identity on κ = (keys, values), behind the source's own
    projections and norm."""
    width = source.k_weight.shape[0]
    eye = torch.eye(2 * width, dtype=source.k_weight.dtype, device=source.k_weight.device)
    on_kappa = dataclasses.replace(
        source, k_weight=eye[:width], v_weight=eye[width:], k_bias=None, v_bias=None, k_norm_weight=None
    )
    own = {"k_weight": source.k_weight, "k_norm_weight": source.k_norm_weight, "v_weight": source.v_weight}
    return dataclasses.replace(exact_factors(on_kappa), **own, k_bias=source.k_bias, v_bias=source.v_bias)  # type: ignore[arg-type]


def _split_keys(rows: Tensor, source: SourceAttention) -> tuple[Tensor, Tensor]:
    """Key rows [G·d, X] as rows that are not rotated [G·(d - 2r), X], group by group, and rotary rows [G·2r, X] as one
    half-split head: first halves of all groups, then second."""
    split = rows.view(source.num_key_value_heads, 2, -1, rows.shape[-1])
    static = split[:, :, source.rotated :].reshape(-1, rows.shape[-1])
    return static, split[:, :, : source.rotated].transpose(0, 1).reshape(-1, rows.shape[-1])


def _exact_up_projections(source: SourceAttention) -> tuple[Tensor, Tensor]:
    """W_UK and W_UV [H, d, R]: identities that read each head's group from the latent of `exact_factors`."""
    groups, dim, half, pairs = source.num_key_value_heads, source.head_dim, source.head_dim // 2, source.rotated
    like = source.v_weight
    rank = exact_shape(source).kv_lora_rank
    eye = torch.eye(rank, dtype=like.dtype, device=like.device)
    values = eye[: groups * dim].view(groups, dim, rank)
    keys = like.new_zeros(groups, 2, half, rank)
    keys[:, :, pairs:] = eye[groups * dim :].view(groups, 2, half - pairs, rank)
    repeats = source.heads_per_group
    return keys.flatten(1, 2).repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)


def _exact_value_bias(source: SourceAttention) -> Tensor | None:
    """Bias [H·2d] of the up-projections: zeros for the keys, each head's own for the values."""
    if source.v_bias is None:
        return None
    bias_HV = source.v_bias.view(source.num_key_value_heads, -1).repeat_interleave(source.heads_per_group, dim=0)
    return torch.cat([torch.zeros_like(bias_HV), bias_HV], dim=1).reshape(-1)


def _exact_queries(rows: Tensor, source: SourceAttention) -> Tensor:
    """Query rows [H·d, X] -> [H·(d + G·2r), X]: the un-rotated part, then the head's rotary rows in its own group's slots."""
    heads, groups, dim, pairs = source.num_attention_heads, source.num_key_value_heads, source.head_dim, source.rotated
    q_HdX = rows.view(heads, dim, -1)
    rotary = rows.new_zeros(heads, 2, groups, pairs, rows.shape[-1])
    for head in range(heads):
        rotary[head, :, head // source.heads_per_group] = q_HdX[head].unflatten(0, (2, dim // 2))[:, :pairs]
    return torch.cat([q_HdX, rotary.flatten(1, 3)], dim=1).flatten(0, 1)

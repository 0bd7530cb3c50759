"""Scales of an MLA layer that may be chosen freely, since one factor takes back what the other was multiplied by.

Latent channels (kv_a rows, or the weight of the latent's norm, against kv_b columns), rotary pairs (kv_a rows against the
query rows of all heads), un-rotated keys (kv_b rows against query rows), values (kv_b rows against o_proj columns) and, where
queries are factorised, their inner channels (q_a rows against q_b columns).

Letters: X hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank, Q q_lora_rank,
U = N + V rows of kv_b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.modeling.layer_xeco import Bits


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """What to multiply by: latent channels [R], rotary keys [P/2], keys [H, N] and values [H, V] in kv_b, queries' inner
    channels [Q]; what faces each is divided."""

    latent: Tensor
    pairs: Tensor
    keys: Tensor
    values: Tensor
    inner: Tensor | None = None


def balance_scales(mla: MlaAttention, num_heads: int) -> MlaAttention:
    """The same function with factors that face each other at equal rms: keys and values by the head.

    Adam moves all weights by the same step, so factors in output units, whose scales differ by hundreds, would learn at
    rates that differ as much. A layer with a latent norm keeps the scales of its latent, which the norm sees.
    """
    q_HQY, kv_b_HUR, o_XHV = _by_head(mla, num_heads)
    rank, nope = kv_b_HUR.shape[2], q_HQY.shape[1] - mla.qk_rope_head_dim
    latent = _alike(_balance(_rms(mla.kv_a_weight[:rank], 1), _rms(kv_b_HUR, (0, 1))), mla.latent_bits)
    if mla.latent_norm_weight is not None:
        latent = torch.ones_like(latent)
    pairs = _balance(
        _rms(mla.kv_a_weight[rank:].unflatten(0, (2, -1)), (0, 2)),
        _rms(q_HQY[:, nope:].unflatten(1, (2, -1)), (0, 1, 3)),
    )
    pairs = _alike(pairs, mla.rope_bits)
    kv_b_HUR = kv_b_HUR / latent
    keys = _balance(_rms(kv_b_HUR[:, :nope], (1, 2)), _rms(q_HQY[:, :nope], (1, 2)))
    values = _balance(_rms(kv_b_HUR[:, nope:], (1, 2)), _rms(o_XHV, (0, 2)))
    scales = _Scales(
        latent=latent,
        pairs=pairs,
        keys=keys[:, None].expand(-1, nope),
        values=values[:, None].expand(-1, o_XHV.shape[2]),
    )
    return _scaled(mla, num_heads, scales)


def balance_for_storage(mla: MlaAttention, num_heads: int) -> MlaAttention:
    """The same function to the last bit, in no wider range than it needs: every row by itself, by powers of two.

    In output units a query row can be 1e5 times its key row (a slow frequency that is hardly looked at), and float16 ends at
    65,504. Biases count as what they add to a row. A norm of the latent is left what it sees: its own weight faces kv_b there.
    """
    q_HQY, kv_b_HUR, o_XHV = _by_head(mla, num_heads)
    rank, nope = kv_b_HUR.shape[2], q_HQY.shape[1] - mla.qk_rope_head_dim
    q_bias, kv_a_bias, kv_b_bias = (
        None if bias is None else bias.unflatten(0, shape)
        for bias, shape in (
            (None if mla.q_head_weight is not None else mla.q_bias, (num_heads, -1)),
            (mla.kv_a_bias, (-1,)),
            (mla.kv_b_bias, (num_heads, -1)),
        )
    )
    down = _sizes(mla.kv_a_weight, kv_a_bias)
    own = down[:rank] if mla.latent_norm_weight is None else mla.latent_norm_weight.abs()
    latent = _power_of_two(_alike(_balance(own, _rms(kv_b_HUR, (0, 1))), mla.latent_bits))
    queries, up = _sizes(q_HQY, q_bias), _sizes(kv_b_HUR / latent, kv_b_bias)
    pairs = _balance(_rms(down[rank:].view(2, -1), 0), _rms(queries[:, nope:].unflatten(1, (2, -1)), (0, 1)))
    inner = None
    if mla.q_a_weight is not None and mla.q_b_weight is not None:
        inner = _power_of_two(_balance(_rms(mla.q_a_weight, 1), _rms(mla.q_b_weight, 0)))
    scales = _Scales(
        latent=latent,
        pairs=_power_of_two(_alike(pairs, mla.rope_bits)),
        keys=_power_of_two(_balance(up[:, :nope], queries[:, :nope])),
        values=_power_of_two(_balance(up[:, nope:], _rms(o_XHV, 0))),
        inner=inner,
    )
    return _scaled(mla, num_heads, scales)


def with_row_scales(mla: MlaAttention, num_heads: int, latent: Tensor, pairs: Tensor) -> MlaAttention:
    """The same function with rows of the latent multiplied by `latent` [R] and rotary pairs by `pairs` [P/2]."""
    nope = mla.kv_b_weight.shape[0] // num_heads - mla.o_weight.shape[1] // num_heads
    ones = mla.kv_b_weight.new_ones(num_heads, mla.kv_b_weight.shape[0] // num_heads)
    return _scaled(mla, num_heads, _Scales(latent=latent, pairs=pairs, keys=ones[:, :nope], values=ones[:, nope:]))


def _by_head(mla: MlaAttention, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that ends in the queries' rows [H, N+P, ...], kv_b [H, U, R] and o_proj [X, H, V]."""
    query = getattr(mla, _query_name(mla))
    by_head = (query.unflatten(0, (num_heads, -1)), mla.kv_b_weight.unflatten(0, (num_heads, -1)))
    return (*by_head, mla.o_weight.unflatten(1, (num_heads, -1)))


def _query_name(mla: MlaAttention) -> str:
    if mla.q_head_weight is not None:
        return "q_head_weight"
    return "q_weight" if mla.q_weight is not None else "q_b_weight"


def _scaled(mla: MlaAttention, num_heads: int, scales: _Scales) -> MlaAttention:
    rope_P, up_HU = scales.pairs.repeat(2), torch.cat([scales.keys, scales.values], dim=1).flatten()
    query_HQ = torch.cat([1 / scales.keys, (1 / rope_P).expand(num_heads, -1)], dim=1).flatten()
    normed = mla.latent_norm_weight is not None
    down = torch.cat([torch.ones_like(scales.latent) if normed else scales.latent, rope_P])
    scaled = {
        "kv_a_weight": mla.kv_a_weight * down[:, None],
        "kv_a_bias": None if mla.kv_a_bias is None else mla.kv_a_bias * down,
        "kv_b_weight": mla.kv_b_weight / scales.latent * up_HU[:, None],
        "kv_b_bias": None if mla.kv_b_bias is None else mla.kv_b_bias * up_HU,
        "o_weight": mla.o_weight / scales.values.flatten(),
        "latent_norm_weight": None if mla.latent_norm_weight is None else mla.latent_norm_weight * scales.latent,
        # behind a norm the queries' own scale stays
        "q_bias": mla.q_bias if mla.q_bias is None or mla.q_head_weight is not None else mla.q_bias * query_HQ,
    }
    name = _query_name(mla)
    scaled[name] = getattr(mla, name) * query_HQ[:, None]
    if scales.inner is not None:
        q_b = scaled["q_b_weight"] if name == "q_b_weight" else mla.q_b_weight
        assert q_b is not None and mla.q_a_weight is not None
        scaled |= {"q_a_weight": mla.q_a_weight * scales.inner[:, None], "q_b_weight": q_b / scales.inner}
    return mla.with_tensors({field: tensor for field, tensor in scaled.items() if tensor is not None})


def _rms(weight: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return weight.square().mean(dim=dims).sqrt()


def _sizes(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The rms of each row (last dimension), with its bias as one more input of size 1."""
    squares = weight.square().sum(dim=-1)
    return ((squares if bias is None else squares + bias.square()) / max(1, weight.shape[-1])).sqrt()


def _balance(own: Tensor, facing: Tensor) -> Tensor:
    """What to multiply `own` by, and divide `facing` by, for equal rms; 1 where either is zero."""
    usable = (own > 0) & (facing > 0)
    return torch.where(usable, facing / torch.where(usable, own, 1.0), 1.0).sqrt()


def _alike(factors: Tensor, bits: Bits) -> Tensor:
    """Their geometric mean for all where rows are cached in codes: those share one scale, and are as large as they count."""
    return factors if bits == 16 or factors.numel() == 0 else factors.log().mean().exp().expand_as(factors)


def _power_of_two(factor: Tensor) -> Tensor:
    """The nearest power of two, exact in every dtype."""
    return torch.exp2(factor.log2().round())

"""A basis of the latent in which the numbers of a token are alike, for codes with one scale a row (ops/packed_rows.py).

The latent comes out of the closed form by what its directions are worth: the first rows are tens of times as large as the last,
and one token's large number would take the codes from all the others. An orthogonal map on the latent is free (it goes into
kv_a_proj, its transpose into kv_b_proj) and changes nothing that is not rounded. The map here has only entries of about equal
size, so that every new number is a sum of all old ones, spread like those of a normal distribution: what a Hadamard matrix does
(QuaRot, arXiv 2404.00456), for ranks that are no power of two.

Letters: R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import MlaAttention


def spreading_map(rank: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix [R, R], float64: a Hartley transform with random signs before it, no entry above √(2/R)."""
    index = torch.arange(rank, dtype=torch.float64)
    angle = 2 * torch.pi * torch.outer(index, index).remainder(rank) / rank
    signs = torch.randint(0, 2, (rank,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    turn: Tensor = (angle.cos() + angle.sin()) * signs / rank**0.5
    return turn


def with_codes(mla: MlaAttention, latent_bits: int, rope_bits: int) -> MlaAttention:
    """The layer as it is cached in codes of so many bits, its latent spread; as it is at 16 bits. Weights keep their dtype.

    A latent norm keeps what it computes, which takes a weight that is the same for all rows: raises `ValueError` otherwise.
    """
    if latent_bits == 16:
        return dataclasses.replace(mla, rope_bits=rope_bits)
    rank, weight = mla.kv_b_weight.shape[1], mla.latent_norm_weight
    if weight is not None and not torch.equal(weight, weight[:1].expand_as(weight)):
        raise ValueError("a latent cannot be turned before a norm whose weight differs between its rows")
    turn = spreading_map(rank).to(mla.kv_b_weight.device)
    bias = None if mla.kv_a_bias is None else _turned(turn, mla.kv_a_bias[:, None], rank)[:, 0]
    return dataclasses.replace(
        mla,
        kv_a_weight=_turned(turn, mla.kv_a_weight, rank),
        kv_a_bias=bias,
        kv_b_weight=(mla.kv_b_weight.double() @ turn.T).to(mla.kv_b_weight.dtype),
        latent_bits=latent_bits,
        rope_bits=rope_bits,
    )


def _turned(turn: Tensor, rows: Tensor, rank: int) -> Tensor:
    """Rows of the latent turned, those of the rotary key as they are."""
    return torch.cat([(turn @ rows[:rank].double()).to(rows.dtype), rows[rank:]])

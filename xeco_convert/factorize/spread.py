"""Latents and rotary keys as codes with one scale a row want them (ops/packed_rows.py).

All numbers of a row are off by the same step, which follows the largest of them. So with E_i the mean square of number i and w_i
what a squared error of it costs, multiplying it by s_i costs Σ w_i / s_i² · Σ s_i² E_i: least at s_i⁴ = w_i / E_i (Cauchy and
Schwarz), where it is (Σ √(w_i E_i))². Factors in output units have w_i = 1, so their rows are multiplied by E_i^(-1/4): half way
to rows that are all alike. What faces a row is divided, which changes nothing that is not rounded.

The latent is turned besides, by an orthogonal map with entries of about equal size: every new number is a sum of all old ones,
spread like those of a normal distribution, and no token's large number takes the codes from all others. A Hadamard matrix does
this in QuaRot (arXiv 2404.00456); this one serves ranks that are no power of two. Rotary pairs cannot be mixed: they turn at
different frequencies.

Letters: R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.balance import balance_scales, with_row_scales
from xeco_convert.factorize.layer_weights import MlaAttention

_LEAST_SHARE = 1e-6  # of the mean energy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowEnergies:
    """Mean squares of latents [R] and of rotary pairs [P/2], in units in which errors of all of them cost the same."""

    latent: Tensor
    pairs: Tensor


def spreading_map(rank: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix [R, R], float64: a Hartley transform with random signs before it, no entry above √(2/R)."""
    index = torch.arange(rank, dtype=torch.float64)
    angle = 2 * torch.pi * torch.outer(index, index).remainder(rank) / rank
    signs = torch.randint(0, 2, (rank,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    turn: Tensor = (angle.cos() + angle.sin()) * signs / rank**0.5
    return turn


def with_codes(
    mla: MlaAttention, num_heads: int, latent_bits: int, rope_bits: int, energies: RowEnergies | None = None
) -> MlaAttention:
    """The layer as it is cached in codes of so many bits, rows scaled and the latent turned; as it is at 16 bits.

    `energies` of a layer in output units; without them what faces a row stands for w, and its own weights for E. Weights keep
    their dtype. A latent norm keeps what it computes: its latent is turned, not scaled, which takes a weight that is the same
    for all rows: raises `ValueError` otherwise.
    """
    if latent_bits == 16:
        return dataclasses.replace(mla, rope_bits=rope_bits)
    rank, weight = mla.kv_b_weight.shape[1], mla.latent_norm_weight
    if weight is not None and not torch.equal(weight, weight[:1].expand_as(weight)):
        raise ValueError("a latent cannot be turned before a norm whose weight differs between its rows")
    mla = balance_scales(mla, num_heads) if energies is None else _scaled(mla, num_heads, energies)
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


def _scaled(mla: MlaAttention, num_heads: int, energies: RowEnergies) -> MlaAttention:
    """Rows multiplied by E^(-1/4)."""
    latent, pairs = (_fourth_root(each).to(mla.kv_b_weight) for each in (energies.latent, energies.pairs))
    if mla.latent_norm_weight is not None:
        latent = torch.ones_like(latent)
    return with_row_scales(mla, num_heads, latent, pairs)


def _fourth_root(energies: Tensor) -> Tensor:
    """1 / E^(1/4), relative to the mean; directions without energy count as the weakest that could matter."""
    if energies.numel() == 0:
        return energies
    return (energies / energies.mean().clamp_min(1e-300)).clamp_min(_LEAST_SHARE) ** -0.25


def _turned(turn: Tensor, rows: Tensor, rank: int) -> Tensor:
    """Rows of the latent turned, those of the rotary key as they are."""
    return torch.cat([(turn @ rows[:rank].double()).to(rows.dtype), rows[rank:]])

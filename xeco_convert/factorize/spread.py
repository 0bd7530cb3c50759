"""Latents and rotary keys as codes with one scale a row want them (ops/packed_rows.py).

All numbers of a row are off by the same step, which follows the largest of them. So with E_i the mean square of number i and w_i
what a squared error of it costs, multiplying it by s_i costs Σ w_i / s_i² · Σ s_i² E_i: least at s_i⁴ = w_i / E_i (Cauchy and
Schwarz), where it is (Σ √(w_i E_i))². Factors in output units have w_i = 1, so their rows are multiplied by E_i^(-1/4): half way
to rows that are all alike. What faces a row is divided, which changes nothing that is not rounded.

The latent is turned besides, by an orthogonal map with entries of about equal size: every new number is a sum of all old ones,
spread like those of a normal distribution, and no token's large number takes the codes from all others. A Hadamard matrix does
this in QuaRot (arXiv 2404.00456); this one serves ranks that are no power of two. Rotary pairs cannot be mixed: they turn at
different frequencies.

A latent in bit planes has runs of numbers with as many bits, the strongest numbers first, each run turned by itself: n numbers of
b bits cost K_b (Σ √E_i)² / n, with K_b what b bits lose of a normal distribution. The shares of bits that cost least are those of
reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3), in whole bits and whole bytes here.

Letters: R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from xeco_convert.factorize.balance import balance_scales, with_row_scales
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.modeling.layer_xeco import Bits
from xeco_convert.ops.packed_rows import CLIP, MOST_PLANES, classes_of

IN_PLANES = (6, 5, 3, 2)  # bits of numbers that lie in bit planes
_LEAST_SHARE = 1e-6  # of the mean energy
# K_b: mean squared error of a normal number in b bits, cut off at CLIP
_LOST = {1: 0.363, 2: 0.119, 3: 0.0384, 4: 0.0122, 5: 0.0036, 6: 0.00106, 7: 0.00031, 8: 0.00008}


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


def allotted_planes(energies: Tensor, bits: int) -> tuple[int, ...]:
    """How many of the rows with these energies [n], strongest first, each bit plane reaches, at `bits` for each on average.

    Bits are given a byte at a time to the plane where they save most, then moved as long as that saves something; all rows get
    the same where that is no worse. n is a multiple of 8, `bits` from 2 to 7.
    """
    num_rows, roots = energies.numel(), _summed_roots(energies)

    def cost(planes: tuple[int, ...]) -> float:
        return _loss(roots, classes_of(planes))

    planes: tuple[int, ...] = (num_rows,)
    for _ in range(num_rows * (bits - 1) // 8):
        planes = min(_changed(planes, more=1), key=cost)
    while True:
        best = min(_changed(planes, more=1, less=1), key=cost, default=planes)
        if cost(best) >= cost(planes):
            return min((num_rows,) * bits, planes, key=cost)
        planes = best


def expected_loss(energies: Tensor, bits: Bits) -> float:
    """Squared error that rows with these energies [n], strongest first, will have in so many bits, in units of the energies."""
    if energies.numel() == 0:
        return 0.0
    planes = planes_for(bits, energies)
    runs = classes_of(planes) if isinstance(planes, tuple) else [(planes, 0, energies.numel())]
    return _loss(_summed_roots(energies), runs)


def planes_for(bits: Bits, energies: Tensor) -> Bits:
    """The bit planes of a latent that lies in those; other bits as they are."""
    return allotted_planes(energies, bits) if isinstance(bits, int) and bits in IN_PLANES else bits


def _summed_roots(energies: Tensor) -> list[float]:
    """Σ √E of the first 0, 1, … n rows."""
    least = _LEAST_SHARE * float(energies.mean())
    return [0.0, *energies.clamp_min(least).sqrt().cumsum(0).tolist()]


def _loss(roots: Sequence[float], runs: Iterable[tuple[int, int, int]]) -> float:
    return math.fsum(_LOST[bits] * (roots[end] - roots[first]) ** 2 / (end - first) for bits, first, end in runs)


def _changed(planes: tuple[int, ...], more: int, less: int = 0) -> Iterator[tuple[int, ...]]:
    """All planes of which `more` reach a byte more, and `less` others a byte less."""
    padded = (*planes, *(0,) * (MOST_PLANES - len(planes)))
    for places in itertools.permutations(range(1, MOST_PLANES), more + less):
        changed = list(padded)
        for number, place in enumerate(places):
            changed[place] += 8 if number < more else -8
        if min(changed) >= 0 and changed == sorted(changed, reverse=True):
            yield tuple(reached for reached in changed if reached)


def with_codes(
    mla: MlaAttention, num_heads: int, latent_bits: Bits, rope_bits: Bits, energies: RowEnergies | None = None
) -> MlaAttention:
    """The layer as it is cached in codes of so many bits, rows scaled and the latent turned; as it is at 16 bits.

    `energies` of a layer in output units; without them what faces a row stands for w, and its own weights for E, and all rows
    get the same bits. Latents that lie in bit planes get those that `allotted_planes` finds. Weights keep their dtype. A latent
    norm keeps what it computes: its latent is turned, not scaled, which takes a weight that is the same for all rows: raises
    `ValueError` otherwise.
    """
    if latent_bits == 16:
        return dataclasses.replace(mla, rope_bits=rope_bits)
    rank, weight = mla.kv_b_weight.shape[1], mla.latent_norm_weight
    if weight is not None and not torch.equal(weight, weight[:1].expand_as(weight)):
        raise ValueError("a latent cannot be turned before a norm whose weight differs between its rows")
    bits: Bits = latent_bits
    if energies is None:
        mla = balance_scales(mla, num_heads)
    else:
        # behind a norm the basis has no order of strength
        bits = planes_for(latent_bits, energies.latent) if weight is None else latent_bits
        mla = _scaled(mla, num_heads, energies, bits)
    turn = _turn_of(bits, rank).to(mla.kv_b_weight.device)
    kv_a_bias = None if mla.kv_a_bias is None else _turned(turn, mla.kv_a_bias[:, None], rank)[:, 0]
    return dataclasses.replace(
        mla,
        kv_a_weight=_turned(turn, mla.kv_a_weight, rank),
        kv_a_bias=kv_a_bias,
        kv_b_weight=(mla.kv_b_weight.double() @ turn.T).to(mla.kv_b_weight.dtype),
        latent_bits=bits,
        rope_bits=rope_bits,
    )


def _turn_of(bits: Bits, rank: int) -> Tensor:
    """The turn of a latent [R, R], float64: numbers of as many bits by themselves."""
    runs = classes_of(bits) if isinstance(bits, tuple) else [(bits, 0, rank)]
    turns: Tensor = torch.block_diag(*(spreading_map(end - first) for _, first, end in runs))
    return turns


def _scaled(mla: MlaAttention, num_heads: int, energies: RowEnergies, latent_bits: Bits) -> MlaAttention:
    """Rows multiplied by E^(-1/4), and runs of as many bits by what lets one scale serve all of them."""
    latent, pairs = (_fourth_root(each).to(mla.kv_b_weight) for each in (energies.latent, energies.pairs))
    if isinstance(latent_bits, tuple):
        for bits, first, end in classes_of(latent_bits):
            rms = (latent[first:end].square() * energies.latent[first:end].to(latent)).mean().sqrt()
            latent[first:end] *= (1 - 2.0**-bits) / CLIP[bits] / rms.clamp_min(1e-30)
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

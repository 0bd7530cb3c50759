"""Fewer latent directions: exact where the others carry nothing, the same whatever basis they come in, the least lost else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs
from torch import Tensor

from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.factorize.smaller_rank import LatentMoments, with_smaller_rank

_HEADS, _RANK, _ROPE = 4, 16, 8
_SCALE = 8**-0.5


def latents_of(mla: MlaAttention, x: Tensor) -> Tensor:
    """Latents [n, R] before a norm."""
    return (x @ mla.kv_a_weight[: mla.kv_b_weight.shape[1]].T).flatten(0, 1)


def moments_of(mla: MlaAttention, x: Tensor) -> LatentMoments:
    rows, factor = latents_of(mla, x), 1.0
    if mla.latent_norm_weight is not None:
        factors = (rows.square().mean(dim=1) + 1e-6).rsqrt()
        rows, factor = rows * factors[:, None] * mla.latent_norm_weight, float(factors.mean())
    assert mla.q_weight is not None
    queries = (x @ mla.q_weight.T).flatten(0, 1).unflatten(1, (_HEADS, -1))[:, :, :8]
    return LatentMoments(
        latents=rows.T @ rows / rows.shape[0],
        mean=rows.mean(dim=0),
        queries=torch.einsum("thn,thm->hnm", queries, queries) / rows.shape[0],
        norm_factor=factor,
    )


@pytest.fixture(scope="module")
def case() -> tuple[MlaAttention, Tensor, object]:
    source, x = random_attention(), gaussian_inputs(windows=20)
    context = context_of(source)
    return calibrated(source, x, context).factors(_RANK, _ROPE), x, context


def with_latent_rows(mla: MlaAttention, rows: Tensor) -> MlaAttention:
    return dataclasses.replace(mla, kv_a_weight=torch.cat([rows, mla.kv_a_weight[_RANK:]]))


def mixed(mla: MlaAttention, seed: int) -> MlaAttention:
    """The same layer with its latent in another basis."""
    matrix = torch.randn(_RANK, _RANK, generator=torch.Generator().manual_seed(seed)).double()
    turned = with_latent_rows(mla, matrix @ mla.kv_a_weight[:_RANK])
    return dataclasses.replace(turned, kv_b_weight=mla.kv_b_weight @ torch.linalg.inv(matrix))


def lost(mla: MlaAttention, smaller: MlaAttention, x: Tensor, context: object) -> float:
    expected = mla_output(mla, _HEADS, x, context)
    return float((mla_output(smaller, _HEADS, x, context) - expected).square().sum() / expected.square().sum())


def test_directions_that_carry_nothing_cost_nothing(case: tuple[MlaAttention, Tensor, object]) -> None:
    mla, x, context = case
    spread = torch.randn(_RANK, 6, generator=torch.Generator().manual_seed(1)).double()
    flat = with_latent_rows(mla, spread @ mla.kv_a_weight[:6])
    smaller = with_smaller_rank(flat, moments_of(flat, x), 6, _SCALE)
    assert smaller.kv_b_weight.shape[1] == 6 and smaller.qk_rope_head_dim == _ROPE
    assert lost(flat, smaller, x, context) < 1e-12
    assert lost(flat, with_smaller_rank(flat, moments_of(flat, x), 5, _SCALE), x, context) > 1e-6


@pytest.mark.parametrize("rank", [4, 9, 15])
def test_the_basis_that_the_latent_came_in_does_not_matter(
    rank: int, case: tuple[MlaAttention, Tensor, object]
) -> None:
    mla, x, context = case
    other = mixed(mla, seed=rank)
    assert lost(mla, other, x, context) < 1e-16
    smaller, turned = (with_smaller_rank(layer, moments_of(layer, x), rank, _SCALE) for layer in (mla, other))
    assert lost(smaller, turned, x, context) < 1e-10


def test_the_best_directions_lose_less_than_the_first_ones_of_any_basis(
    case: tuple[MlaAttention, Tensor, object],
) -> None:
    mla, x, context = case
    errors = [
        lost(mla, with_smaller_rank(mla, moments_of(mla, x), rank, _SCALE), x, context) for rank in (15, 12, 8, 4)
    ]
    assert errors == sorted(errors)
    other = mixed(mla, seed=2)
    first = dataclasses.replace(
        other,
        kv_a_weight=torch.cat([other.kv_a_weight[:8], other.kv_a_weight[_RANK:]]),
        kv_b_weight=other.kv_b_weight[:, :8],
    )
    assert errors[2] < 0.5 * lost(mla, first, x, context)


def test_a_norm_becomes_the_mean_of_what_it_did(case: tuple[MlaAttention, Tensor, object]) -> None:
    """In a steady basis that is nearly the layer itself."""
    mla, x, context = case
    steady = with_steady_basis(mla, steady_basis(latents_of(mla, x)))
    steady = dataclasses.replace(
        steady, latent_norm_weight=steady.latent_norm_weight * 3, kv_b_weight=steady.kv_b_weight / 3
    )
    smaller = with_smaller_rank(steady, moments_of(steady, x), _RANK - 1, _SCALE)
    assert smaller.latent_norm_weight is None
    without = with_smaller_rank(mla, moments_of(mla, x), _RANK - 1, _SCALE)
    norm_costs = lost(mla, steady, x, context)
    assert lost(mla, smaller, x, context) < 2 * (lost(mla, without, x, context) + norm_costs)

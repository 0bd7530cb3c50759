"""A basis of the latent in which its RMSNorm changes almost nothing (docs/conversion.md, "A latent norm that costs little").

A norm on the latent divides each token's c by its own rms. Any invertible basis change A of the latent is free (A·W_down before
the norm, W_up·A⁻¹ behind it), and the norm then divides by the rms of A·c instead: so A is chosen to make |A·c| vary as little
as it can from token to token, without leaning on small differences of large coordinates that half precision would round away.

Letters: n tokens, R kv_lora_rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import MlaAttention

_STEPS = 300
_BATCH_TOKENS = 1024
_LEARNING_RATE = 0.01  # in whitened coordinates, falling to zero
# Relative squared rounding error of a coordinate, about that of bfloat16: what A⁻¹ makes of it counts like variation.
_ROUNDING = 1e-5
_DAMPING = 1e-6  # of the second moments, so that directions without tokens do not blow up


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteadyBasis:
    """`matrix` A [R, R], at which the rms of A·c is 1 on average; `variation`: mean of (rms(A·c) − 1)², and `before` that of
    the latent as it came, about its own mean rms."""

    matrix: Tensor
    variation: float
    before: float


def steady_basis(latents_nR: Tensor, *, seed: int = 0) -> SteadyBasis:
    """The basis change for these tokens' latents [n, R], found by Adam from whitened coordinates; float64."""
    latents = latents_nR.double()
    rank = latents.shape[1]
    moments = latents.T @ latents / latents.shape[0]
    moments += _DAMPING * moments.diagonal().mean().clamp_min(1e-300) * torch.eye(rank).to(moments)
    white = torch.linalg.cholesky(torch.linalg.inv(moments)).T
    coordinates = latents @ white.T
    identity = torch.eye(rank, dtype=torch.float64, device=latents.device)
    turn = identity.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([turn], lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    best, least = identity, _cost(identity, coordinates)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / _STEPS)
        chosen = torch.randint(0, coordinates.shape[0], (_BATCH_TOKENS,), generator=generator).to(latents.device)
        with torch.enable_grad():
            loss = _cost(turn, coordinates[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if _cost(turn.detach(), coordinates) < least:
        best = turn.detach()
    turned = coordinates @ best.T
    scale = turned.square().mean(dim=1).sqrt().mean()
    return SteadyBasis(
        matrix=best @ white / scale, variation=float(_variation(turned)), before=float(_variation(latents))
    )


def _cost(turn: Tensor, coordinates: Tensor) -> Tensor:
    """Variation of the rms in these coordinates, and rounding that their inverse would amplify (1 where it is orthogonal)."""
    rows = turn.norm(dim=1)
    amplified = (torch.linalg.inv(turn) * rows[None]).square().sum() / turn.shape[0]
    cost: Tensor = _variation(coordinates @ turn.T) + _ROUNDING * amplified
    return cost


def with_steady_basis(mla: MlaAttention, basis: SteadyBasis) -> MlaAttention:
    """The layer with a norm on its latent, in this basis: the same function but for what the norm still changes.

    `basis` is of the latent as `mla` computes it, before a norm that it may have. Weights keep their dtype.
    """
    rank, dtype = mla.kv_b_weight.shape[1], mla.kv_b_weight.dtype
    matrix = basis.matrix
    up = mla.kv_b_weight.double()
    if mla.latent_norm_weight is not None:
        up = up * mla.latent_norm_weight.double()
    up = torch.linalg.solve(matrix.T, up.T).T
    latent, rope = mla.kv_a_weight[:rank].double(), mla.kv_a_weight[rank:]
    bias = mla.kv_a_bias
    if bias is not None:
        bias = torch.cat([(matrix @ bias[:rank].double()).to(dtype), bias[rank:]])
    return dataclasses.replace(
        mla,
        kv_a_weight=torch.cat([(matrix @ latent).to(dtype), rope]),
        kv_a_bias=bias,
        kv_b_weight=up.to(dtype),
        latent_norm_weight=torch.ones(rank, dtype=dtype, device=mla.kv_b_weight.device),
    )


def _variation(latents: Tensor) -> Tensor:
    """Mean of (rms / mean rms − 1)² over tokens."""
    rms = (latents.square().mean(dim=1) + 1e-300).sqrt()
    return (rms / rms.mean() - 1).square().mean()

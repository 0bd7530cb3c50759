"""A converted layer at a smaller latent rank: the best rows of its latent in output units (docs/conversion.md, "A smaller rank").

The same metric as in the closed form of step 3, with the converted layer in place of its source. Whatever basis the latent is in,
and however it came about, its directions are put into order of importance first.

Letters: H heads, N qk_nope_head_dim, V v_head_dim, R kv_lora_rank, X hidden_size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import MlaAttention

# Directions whose weight is this far below the largest are rounding, not signal.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, kw_only=True)
class LatentMoments:
    """Of the tokens of a text, float64: of latents as kv_b reads them, behind a norm, E[c cᵀ] [R, R] and E[c] [R]; of
    un-rotated queries E[q qᵀ] [H, N, N]; and the mean factor by which a norm multiplied latents, 1 where there is none."""

    latents: Tensor
    mean: Tensor
    queries: Tensor
    norm_factor: float


def with_smaller_rank(mla: MlaAttention, moments: LatentMoments, rank: int, softmax_scale: float) -> MlaAttention:
    """The layer with the `rank` latent directions without which its output would lose most, and no norm on them.

    An error δ of the latent costs δᵀ G δ, G = Σ_h W_UV,hᵀ W_o,hᵀ W_o,h W_UV,h + λ_h W_UK,hᵀ E[q qᵀ] W_UK,h: of values as heads
    put them out, and of scores, of which λ_h makes output units (the spread of the values that a head mixes). The best
    latents are U_Rᵀ G^½ c, U_R the first eigenvectors of G^½ E[c cᵀ] G^½. A norm becomes the mean of what it did; the caller
    puts a new one in place. Weights keep their dtype.
    """
    width, dtype = mla.kv_b_weight.shape[1], mla.kv_b_weight.dtype
    root, inverse = _roots(_metric(mla, moments, softmax_scale))
    vectors = torch.linalg.eigh(root @ moments.latents @ root)[1].flip(1)[:, :rank]
    encode, decode = vectors.T @ root, inverse @ vectors
    if mla.latent_norm_weight is not None:
        encode = encode * mla.latent_norm_weight.double() * moments.norm_factor
    down = encode @ mla.kv_a_weight[:width].double()
    return dataclasses.replace(
        mla,
        kv_a_weight=torch.cat([down.to(dtype), mla.kv_a_weight[width:]]),
        kv_b_weight=(mla.kv_b_weight.double() @ decode).to(dtype),
        latent_norm_weight=None,
    )


def _metric(mla: MlaAttention, moments: LatentMoments, softmax_scale: float) -> Tensor:
    """G [R, R]."""
    heads, nope = moments.queries.shape[:2]
    up_HUR = mla.kv_b_weight.double().unflatten(0, (heads, -1))
    keys_HNR, values_HVR = up_HUR[:, :nope], up_HUR[:, nope:]
    out_HXR = mla.o_weight.double().unflatten(1, (heads, -1)).transpose(0, 1) @ values_HVR
    values_HRR = out_HXR.transpose(1, 2) @ out_HXR
    spread = moments.latents - torch.outer(moments.mean, moments.mean)
    weight_H = softmax_scale**2 * (values_HRR * spread).sum(dim=(1, 2))
    scores_HRR = keys_HNR.transpose(1, 2) @ moments.queries @ keys_HNR
    metric_HRR: Tensor = values_HRR + weight_H[:, None, None] * scores_HRR
    return metric_HRR.sum(dim=0)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semi-definite matrix, and its pseudo-inverse."""
    eigenvalues, vectors = torch.linalg.eigh(metric)
    usable = eigenvalues > _NEGLIGIBLE * eigenvalues[-1]
    root = eigenvalues.clamp_min(0).sqrt()
    inverse = torch.where(usable, 1 / root.clamp_min(1e-300), 0.0)
    flipped = vectors.T
    return (vectors * torch.where(usable, root, 0.0)) @ flipped, (vectors * inverse) @ flipped

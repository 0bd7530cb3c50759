"""Closed-form refit of a converted layer's value side: least squares of the source's attention output on what the
converted heads attend to (docs/conversion.md, step 5).

Letters: W windows, T tokens, X hidden_size, H heads, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.attention import AttentionContext, mla_attended, split_up_projection
from xeco_convert.factorize.layer_weights import MlaAttention

# Ridges to choose from, as shares of the features' mean square: they pull towards the closed form where the tokens say
# nothing. With 10k tokens the smallest fits the noise of some layers (0.32 on its own windows, 0.43 on others).
_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Features of the joint refit of W_UV and W_o; beyond this their Gram matrix takes gigabytes, and o_proj alone is refitted.
_MOST_FEATURES = 8192
_SKETCH = 64  # outputs that choose the ridge, random mixtures of all
_BLOCK = 256  # features at a time: of the symmetric Gram matrix only the lower blocks are computed
_TINY = 1e-150  # the smallest scale of a direction: its root and one over it are numbers


class ValueRefit:
    """Adds up the normal equations over windows of the layer's (normed) input, then solves them."""

    def __init__(self, mla: MlaAttention, num_heads: int, context: AttentionContext) -> None:
        self._mla = mla
        self._context = context
        self._heads = num_heads
        _, w_uv = split_up_projection(mla, self._heads)
        self._w_uv = w_uv.double()
        self._joint = self._heads * w_uv.shape[2] <= _MOST_FEATURES
        features = self._heads * (w_uv.shape[2] if self._joint else w_uv.shape[1])
        self._fitted = _Moments.of(features, mla.o_weight)
        self._held_out = _Moments.of(features, mla.o_weight)

    def add(
        self,
        x_WTX: Tensor,
        counts_WT: Tensor,
        target_WTX: Tensor,
        weights_WT: Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> Tensor:
        """Windows of inputs, in the dtype of the weights, which of their tokens count, and what the attention should put out
        there (o_bias included). weights_WT: of their squared errors [1 each]. `held_out` windows choose the ridge before they
        join the fit. Gives back the attended latents [W, T, H, R], which the fit does not change."""
        counts = counts_WT.to(x_WTX.device)
        attended = mla_attended(self._mla, self._heads, x_WTX, self._context)
        features = attended
        if not self._joint:
            features = torch.einsum("wthr,hvr->wthv", attended, self._w_uv.to(attended.dtype))
        features = features[counts].flatten(1)
        target = target_WTX[counts]
        if self._mla.o_bias is not None:
            target = target - self._mla.o_bias
        if weights_WT is not None:
            roots = weights_WT[counts].sqrt()[:, None]
            features, target = features * roots, target * roots
        (self._held_out if held_out else self._fitted).add(features, target)
        return attended

    def result(self) -> MlaAttention:
        """The layer with the solution in place of its value up-projection and o_proj, in their dtype."""
        prior = self._prior()  # [features, X]
        ridge = self._best_ridge(prior)
        moments = self._fitted.join(self._held_out)
        solution, gram = moments.solve(ridge, prior)
        if not self._joint:
            return dataclasses.replace(self._mla, o_weight=solution.T.to(self._mla.o_weight.dtype))
        return self._split(solution, gram)

    def _best_ridge(self, prior: Tensor) -> float:
        """By the held-out windows, on a sketch of the outputs: their errors have the same order there, at a tenth of the cost."""
        width = prior.shape[1]
        if width <= _SKETCH:
            sketch = torch.eye(width, dtype=prior.dtype)
        else:
            sketch = torch.randn(width, _SKETCH, generator=torch.Generator().manual_seed(0), dtype=prior.dtype)
        sketch = sketch.to(prior.device)
        fitted, held_out = self._fitted.sketched(sketch), self._held_out.mirrored().sketched(sketch)
        return min(_RIDGES, key=lambda share: held_out.error(fitted.solve(share, prior @ sketch)[0]))

    def _prior(self) -> Tensor:
        """What the closed form computes from the features: the point that the ridge pulls to."""
        o_weight = self._mla.o_weight.double()
        if not self._joint:
            return o_weight.T
        w_o = o_weight.view(-1, self._heads, self._w_uv.shape[1]).permute(1, 2, 0)  # [H, V, X]
        return (self._w_uv.transpose(1, 2) @ w_o).flatten(0, 1)

    def _split(self, solution: Tensor, gram: Tensor) -> MlaAttention:
        """Each head's map [R, X] from latent to output as W_UV [V, R] and W_o [X, V], best in the metric of its features.

        With the head's block of the features' Gram matrix as L·Lᵀ, the error of a map is the norm of Lᵀ times its error: the
        best of rank V are the leading left singular vectors of M = Lᵀ·map, taken from M·Mᵀ, which is R × R whatever X is.
        Their projection of M is exact where no vector is left out.
        """
        heads, width, rank = self._w_uv.shape
        maps = solution.view(heads, rank, -1)
        own = gram.view(heads, rank, heads, rank).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        blocks = torch.linalg.cholesky(own)  # reads the lower part
        weighed = blocks.transpose(1, 2) @ maps
        squares, vectors = torch.linalg.eigh(weighed @ weighed.transpose(1, 2))
        count = min(width, rank, weighed.shape[2])
        left, squares = vectors.flip(2)[..., :count], squares.flip(1)[:, :count]
        up = torch.linalg.solve_triangular(blocks.transpose(1, 2), left, upper=True)
        # half of the scale to each factor, in the metric of the features
        root = squares.clamp_min(0).sqrt()
        root = root.maximum(1e-6 * root[:, :1]).clamp_min(_TINY).sqrt().unsqueeze(1)
        w_uv = torch.zeros_like(self._w_uv)
        w_uv[:, :count] = (up * root).transpose(1, 2)
        w_o = torch.zeros(heads, width, maps.shape[2], dtype=torch.float64, device=maps.device)
        w_o[:, :count] = (left / root).transpose(1, 2) @ weighed
        mla = self._mla
        up_rows = mla.kv_b_weight.unflatten(0, (heads, -1)).clone()
        up_rows[:, up_rows.shape[1] - width :] = w_uv.to(up_rows.dtype)
        return dataclasses.replace(
            mla,
            kv_b_weight=up_rows.flatten(0, 1),
            o_weight=w_o.permute(2, 0, 1).reshape(-1, heads * width).to(mla.o_weight.dtype),
        )


class _Moments:
    """Second moments of features, and of features with targets, float64: the normal equations of a regression. Of the Gram
    matrix the lower blocks are added up, the upper ones stay zero."""

    def __init__(self, gram: Tensor, cross: Tensor) -> None:
        self._gram = gram
        self._cross = cross

    @classmethod
    def of(cls, num_features: int, like: Tensor) -> _Moments:
        """Of no rows yet: [features, features] and [features, X]."""
        gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=like.device)
        return cls(gram, gram.new_zeros(num_features, like.shape[0]))

    def add(self, features: Tensor, target: Tensor) -> None:
        """Rows of features [n, features] and targets [n, X]: products in their dtype, sums in float64."""
        for start in range(0, features.shape[1], _BLOCK):
            rows = features[:, start : start + _BLOCK].T
            stop = start + rows.shape[0]
            self._gram[start:stop, :stop] += rows @ features[:, :stop]
        self._cross += features.T @ target

    def mirrored(self) -> _Moments:
        """These, with the upper part of the Gram matrix as well, in place."""
        self._gram.copy_(self._gram.tril() + self._gram.tril(-1).T)
        return self

    def sketched(self, sketch: Tensor) -> _Moments:
        """For targets times `sketch` [X, n]."""
        return _Moments(self._gram, self._cross @ sketch)

    def join(self, other: _Moments) -> _Moments:
        """These with the other's rows, in place: at 8192 features each Gram matrix takes half a gigabyte."""
        self._gram += other._gram
        self._cross += other._cross
        return self

    def solve(self, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The solution [features, X] that the ridge pulls towards `prior`, and the matrix that was solved with (lower part)."""
        pull = ridge * float(self._gram.diagonal().mean())
        gram = self._gram.clone()
        gram.diagonal().add_(pull)
        lower = torch.linalg.cholesky(gram)  # reads the lower part
        return torch.cholesky_solve(self._cross + pull * prior, lower), gram

    def error(self, solution: Tensor) -> float:
        """Squared error of a solution on these rows, up to a constant; 0 for every one where there are no rows. `mirrored`
        comes first."""
        return float((solution * (self._gram @ solution - 2 * self._cross)).sum())

"""Closed-form refit of a converted layer's value side: least squares of the source's attention output on what the
converted heads attend to (docs/conversion.md, step 5).

Letters: W windows, T tokens, X hidden_size, H heads, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xeco_convert.factorize.attention import AttentionContext, mla_attended, source_output, split_up_projection
from xeco_convert.factorize.layer_weights import MlaAttention, SourceAttention

# Ridges to choose from, as shares of the features' mean square: they pull towards the closed form where the tokens say
# nothing. With 10k tokens the smallest fits the noise of some layers (0.32 on its own windows, 0.43 on others).
_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Features of the joint refit of W_UV and W_o; beyond this their Gram matrix takes gigabytes, and o_proj alone is refitted.
_MOST_FEATURES = 8192


class ValueRefit:
    """Adds up the normal equations over windows of the layer's (normed) input, then solves them."""

    def __init__(self, source: SourceAttention, mla: MlaAttention, context: AttentionContext) -> None:
        self._source = source
        self._mla = mla
        self._context = context
        self._heads = source.num_attention_heads
        _, w_uv = split_up_projection(mla, self._heads)
        self._w_uv = w_uv.double()
        self._joint = self._heads * w_uv.shape[2] <= _MOST_FEATURES
        features = self._heads * (w_uv.shape[2] if self._joint else w_uv.shape[1])
        self._fitted = _Moments(features, mla.o_weight)
        self._held_out = _Moments(features, mla.o_weight)

    def add(
        self, x_WTX: Tensor, counts_WT: Tensor, target_WTX: Tensor | None = None, *, held_out: bool = False
    ) -> None:
        """Windows of inputs, in the dtype of the weights, and which of their tokens count; `held_out` windows choose the
        ridge before they join the fit.

        `target_WTX`: what the attention should put out (o_bias included) instead of the source's output on these inputs.
        """
        counts = counts_WT.to(x_WTX.device)
        attended = mla_attended(self._mla, self._heads, x_WTX, self._context)
        if not self._joint:
            attended = torch.einsum("wthr,hvr->wthv", attended, self._w_uv.to(attended.dtype))
        features = attended[counts].flatten(1)
        output = source_output(self._source, x_WTX, self._context) if target_WTX is None else target_WTX
        target = output[counts]
        if self._source.o_bias is not None:
            target = target - self._source.o_bias
        (self._held_out if held_out else self._fitted).add(features, target)

    def result(self) -> MlaAttention:
        """The layer with the solution in place of its value up-projection and o_proj, in their dtype."""
        prior = self._prior()  # [features, X]
        ridge = min(_RIDGES, key=lambda share: self._held_out.error(self._fitted.solve(share, prior)[0]))
        solution, gram = self._fitted.join(self._held_out).solve(ridge, prior)
        if not self._joint:
            return dataclasses.replace(self._mla, o_weight=solution.T.to(self._mla.o_weight.dtype))
        return self._split(solution, gram)

    def _prior(self) -> Tensor:
        """What the closed form computes from the features: the point that the ridge pulls to."""
        o_weight = self._mla.o_weight.double()
        if not self._joint:
            return o_weight.T
        w_o = o_weight.view(-1, self._heads, self._w_uv.shape[1]).permute(1, 2, 0)  # [H, V, X]
        return (self._w_uv.transpose(1, 2) @ w_o).flatten(0, 1)

    def _split(self, solution: Tensor, gram: Tensor) -> MlaAttention:
        """Each head's map [R, X] from latent to output as W_UV [V, R] and W_o [X, V], best in the metric of its features."""
        heads, width, rank = self._w_uv.shape
        maps = solution.view(heads, rank, -1)
        blocks = gram.view(heads, rank, heads, rank).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        w_uv = torch.zeros_like(self._w_uv)
        w_o = torch.zeros(heads, width, maps.shape[-1], dtype=torch.float64, device=maps.device)
        for head in range(heads):
            lower = torch.linalg.cholesky(blocks[head])
            # gram = L·Lᵀ: the error of a map is the norm of Lᵀ times its error, so truncate the SVD of Lᵀ·map
            left, values, right = torch.linalg.svd(lower.T @ maps[head], full_matrices=False)
            rank = min(width, values.shape[0])
            up = torch.linalg.solve_triangular(lower.T, left[:, :rank], upper=True)
            # half of the scale to each factor, in the metric of the features
            root = values[:rank].clamp_min(1e-12 * float(values[0])).sqrt()
            w_uv[head, :rank] = (up * root).T
            w_o[head, :rank] = root[:, None] * right[:rank]
        mla = self._mla
        rows = mla.kv_b_weight.unflatten(0, (heads, -1)).clone()
        rows[:, rows.shape[1] - width :] = w_uv.to(rows.dtype)
        return dataclasses.replace(
            mla,
            kv_b_weight=rows.flatten(0, 1),
            o_weight=w_o.permute(2, 0, 1).reshape(-1, heads * width).to(mla.o_weight.dtype),
        )


class _Moments:
    """Second moments of features, and of features with targets, float64: the normal equations of a regression."""

    def __init__(self, num_features: int, like: Tensor) -> None:
        self._gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=like.device)
        self._cross = torch.zeros(num_features, like.shape[0], dtype=torch.float64, device=like.device)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Rows of features [n, features] and targets [n, X]: products in their dtype, sums in float64."""
        self._gram += (features.T @ features).double()
        self._cross += (features.T @ target).double()

    def join(self, other: _Moments) -> _Moments:
        """These with the other's rows, in place: at 8192 features each Gram matrix takes half a gigabyte."""
        self._gram += other._gram
        self._cross += other._cross
        return self

    def solve(self, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The solution [features, X] that the ridge pulls towards `prior`, and the matrix that was solved with."""
        pull = ridge * float(self._gram.diagonal().mean())
        gram = self._gram.clone()
        gram.diagonal().add_(pull)
        return torch.linalg.solve(gram, self._cross + pull * prior), gram

    def error(self, solution: Tensor) -> float:
        """Squared error of a solution on these rows, up to a constant; 0 for every one where there are no rows."""
        return float((solution * (self._gram @ solution - 2 * self._cross)).sum())

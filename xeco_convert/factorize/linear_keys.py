"""Linear keys in place of normalised ones, by regression on the input (docs/conversion.md, "Beyond plain attention").

A latent can only hold keys that are linear in the layer's input. QK-norm divides each key by its own rms, which varies from
token to token; the best linear map is found by least squares over the calibration tokens, and its error reported.

Letters: W windows, T tokens, X hidden_size, G groups, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.factorize.attention import source_projections
from xeco_convert.factorize.layer_weights import SourceAttention

# Ridges to choose from, as shares of the inputs' mean square: they pull towards the projection times the mean inverse rms.
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LinearKeys:
    """The layer with linear keys. `error`: relative squared error of the keys on held-out tokens, E|k - Wx|^2 / E|k|^2;
    `prior_error`: that of the projection with one mean scale for each group, which needs no regression."""

    source: SourceAttention
    error: float
    prior_error: float


class KeyRegression:
    """Adds up the normal equations over windows of the layer's (normed) input, then solves them."""

    def __init__(self, source: SourceAttention) -> None:
        self._source = source
        width = source.q_weight.shape[1] + (source.k_bias is not None)
        keys = source.k_weight.shape[0]
        self._fitted = _Sums(width, keys, source.k_weight.device)
        self._held_out = _Sums(width, keys, source.k_weight.device)

    @torch.no_grad()
    def add(self, x_WTX: Tensor, counts_WT: Tensor, *, held_out: bool = False) -> None:
        """Windows of inputs in the dtype of the weights, and which of their tokens count; `held_out` ones choose the ridge."""
        keys = source_projections(self._source, x_WTX)[1].flatten(2)
        counts = counts_WT.to(x_WTX.device)
        (self._held_out if held_out else self._fitted).add(self._features(x_WTX[counts]), keys[counts])

    def _features(self, x_nX: Tensor) -> Tensor:
        """Inputs, and a constant where the projection has a bias."""
        return x_nX if self._source.k_bias is None else torch.cat([x_nX, torch.ones_like(x_nX[:, :1])], dim=1)

    def result(self) -> LinearKeys:
        """The solution of the ridge that does best on the held-out windows, from all windows."""
        prior = self._prior()
        ridge = min(_RIDGES, key=lambda share: self._held_out.error(self._fitted.solve(share, prior)))
        error = self._held_out.error(self._fitted.solve(ridge, prior))
        solution = self._fitted.plus(self._held_out).solve(ridge, prior).T
        weight = self._source.k_weight
        k_bias = None if self._source.k_bias is None else solution[:, -1].to(weight.dtype)
        linear = self._source.with_linear_keys(solution[:, : weight.shape[1]].to(weight.dtype), k_bias)
        return LinearKeys(source=linear, error=error, prior_error=self._held_out.error(prior))

    def _prior(self) -> Tensor:
        """[X, G·d]: norm weight times projection, times the best single scale for each group."""
        source, groups = self._source, self._source.num_key_value_heads
        assert source.k_norm_weight is not None
        gain = source.k_norm_weight if source.q_norm == "all" else source.k_norm_weight.repeat(groups)
        rows = source.k_weight if source.k_bias is None else torch.cat([source.k_weight, source.k_bias[:, None]], dim=1)
        raw = (gain[:, None] * rows).double()
        agreement = (raw * self._fitted.cross.T).sum(dim=1).view(groups, -1).sum(dim=1)
        power = ((raw @ self._fitted.gram) * raw).sum(dim=1).view(groups, -1).sum(dim=1)
        scale = agreement / power.clamp_min(1e-300)
        return (raw * scale.repeat_interleave(source.head_dim)[:, None]).T


class _Sums:
    """Second moments of features [F, F] and of features with keys [F, K], float64, and the keys' square."""

    def __init__(self, features: int, keys: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, keys, dtype=torch.float64, device=device)
        self.square = 0.0

    def add(self, features: Tensor, keys: Tensor) -> None:
        self.gram += (features.T @ features).double()
        self.cross += (features.T @ keys).double()
        self.square += float(keys.double().square().sum())

    def plus(self, other: _Sums) -> _Sums:
        total = _Sums(self.cross.shape[0], self.cross.shape[1], self.cross.device)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.square = self.square + other.square
        return total

    def solve(self, share: float, prior: Tensor) -> Tensor:
        """Least squares with a ridge, a share of the features' mean square, towards `prior` [F, K]."""
        pull = share * float(self.gram.diagonal().mean().clamp_min(1e-300))
        eye = torch.eye(self.gram.shape[0], dtype=torch.float64, device=self.gram.device)
        solution: Tensor = torch.linalg.solve(self.gram + pull * eye, self.cross + pull * prior)
        return solution

    def error(self, solution: Tensor) -> float:
        """Relative squared error of a solution on these tokens; 0 where there are none."""
        if self.square == 0:
            return 0.0
        lost = self.square + float((solution * (self.gram @ solution - 2 * self.cross)).sum())
        return max(lost, 0.0) / self.square

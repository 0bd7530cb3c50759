"""Closed-form refit of a converted layer's score side, W_UK and the query weights: least squares of the source's attention
output, linear in small changes of the scores (docs/conversion.md, step 8).

A change δs(t,s) of a head's scores moves its attended latent by Σ_s a(t,s) (δs(t,s) - mean) c_s: the attention-weighted
latents are the features, their mean under the attention taken off because softmax ignores it. δs is linear in changes of
W_UK and of the queries, so all heads of a layer are one least squares problem (one Gauss-Newton step). Its matrix is far too
large to be written down (H·(N·R + (N+P)·X) unknowns), but only products with it are needed: conjugate gradients, with the
Kronecker factors of its diagonal blocks as preconditioner and as the metric of the ridge.

Letters: W windows, T tokens, X hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, R kv_lora_rank, Y inputs of the
query weights (X, or q_lora_rank).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.factorize.attention import AttentionContext, mla_compressed, mla_output, rotate, split_up_projection
from xeco_convert.factorize.layer_weights import MlaAttention

_RIDGE = 3e-2  # in the preconditioner's metric, as a share of the largest curvature met
_DAMPING = 1e-3  # of the preconditioner's own factors, as a share of their mean diagonal
# Iterations at which a solution is offered, and steps along it: more iterations fit the tokens closer, and a whole step may
# be more than the linear picture holds for. The caller chooses by held-out error.
_OFFERED = (4, 8)
_STEPS = (1.0, 0.5)


@dataclass(frozen=True, kw_only=True)
class ScoreTokens:
    """Some windows: the layer's (normed) inputs [w, T, X], how much squared errors at their tokens count [w, T] (0: not at
    all), and what the attention should put out [w, T, X], o_bias included."""

    inputs: Tensor
    weights: Tensor
    target: Tensor


@dataclass(frozen=True)
class _Change:
    """A direction in the unknowns: changes of W_UK [H, N, R] and of the query weights [H, N+P, Y]."""

    keys: Tensor
    queries: Tensor

    def plus(self, factor: float, other: _Change) -> _Change:
        return _Change(self.keys + factor * other.keys, self.queries + factor * other.queries)

    def dot(self, other: _Change) -> float:
        return float((self.keys * other.keys).sum() + (self.queries * other.queries).sum())


class ScoreRefit:
    """The problem of one layer over the windows of `parts`, each small enough for [w, H, T, T] weights in memory."""

    def __init__(
        self, mla: MlaAttention, num_heads: int, context: AttentionContext, parts: Sequence[ScoreTokens]
    ) -> None:
        self._mla = mla
        self._heads = num_heads
        self._context = context
        self._parts = parts
        self._w_uk, w_uv = split_up_projection(mla, num_heads)
        w_o = mla.o_weight.unflatten(1, (num_heads, -1))  # [X, H, V]
        self._maps_HXR = torch.einsum("xhv,hvr->hxr", w_o, w_uv)
        self._query_name = "q_weight" if mla.q_weight is not None else "q_b_weight"
        self._q_HQY = getattr(mla, self._query_name).unflatten(0, (num_heads, -1))
        self._nope = self._w_uk.shape[1]

    @torch.no_grad()
    def offers(self) -> Iterator[MlaAttention]:
        """The layer with refitted W_UK and queries, after more and more iterations and for several steps."""
        gradient, metric = self._first_pass()
        direction = metric.solve(gradient)
        scale = gradient.dot(direction)
        if not scale > 0:
            return  # nothing to gain to first order, or not a number
        solution, residual = gradient.plus(-1.0, gradient), gradient
        search, power = direction, scale
        curvature = self._curvature(search)
        ridge = _RIDGE * search.dot(curvature) / metric.square(search)
        for iteration in range(1, max(_OFFERED) + 1):
            curved = curvature.plus(ridge, metric.times(search))
            length = power / search.dot(curved)
            solution = solution.plus(length, search)
            residual = residual.plus(-length, curved)
            if iteration in _OFFERED:
                yield from (self._changed(solution, step) for step in _STEPS)
            direction = metric.solve(residual)
            power, before = residual.dot(direction), power
            if not power > 1e-20 * scale:
                return
            search = direction.plus(power / before, search)
            curvature = self._curvature(search)

    def _changed(self, change: _Change, step: float) -> MlaAttention:
        rows = self._mla.kv_b_weight.unflatten(0, (self._heads, -1)).clone()
        rows[:, : self._nope] += step * change.keys
        queries = (self._q_HQY + step * change.queries).flatten(0, 1)
        return dataclasses.replace(self._mla, kv_b_weight=rows.flatten(0, 1), **{self._query_name: queries})

    def _first_pass(self) -> tuple[_Change, _Metric]:
        """The gradient of the squared error at the present weights, downhill, and the Kronecker factors."""
        metric = _Metric(self._w_uk, self._q_HQY)
        total = _Change(torch.zeros_like(self._w_uk), torch.zeros_like(self._q_HQY))
        for part in self._parts:
            view = self._look(part)
            output = mla_output(self._mla, self._heads, part.inputs, self._context)
            total = total.plus(1.0, self._pull_back(view, (part.target - output) * part.weights[..., None]))
            metric.add(view, part.weights, self._maps_HXR)
        return total, metric.finished()

    def _curvature(self, change: _Change) -> _Change:
        """JᵀJ on a direction, J the derivative of the output by the unknowns."""
        total = _Change(torch.zeros_like(change.keys), torch.zeros_like(change.queries))
        for part in self._parts:
            view = self._look(part)
            total = total.plus(1.0, self._pull_back(view, self._push(view, change) * part.weights[..., None]))
        return total

    def _look(self, part: ScoreTokens) -> _View:
        """Queries, keys and attention weights of the present layer."""
        mla, context = self._mla, self._context
        features = part.inputs if mla.q_a_weight is None else functional.linear(part.inputs, mla.q_a_weight)
        queries = torch.einsum("wty,hqy->whtq", features, self._q_HQY)
        if mla.q_bias is not None:
            queries = queries + mla.q_bias.unflatten(0, (self._heads, 1, -1))
        latent, k_rope, cos, sin = mla_compressed(mla, part.inputs, context)
        keys = torch.cat([latent, rotate(k_rope, cos, sin)], dim=-1)  # [w, T, R+P]
        turn = (cos.unsqueeze(1), sin.unsqueeze(1))
        rows = torch.cat([queries[..., : self._nope] @ self._w_uk, rotate(queries[..., self._nope :], *turn)], dim=-1)
        scores = context.softmax_scale * rows @ keys.unsqueeze(1).transpose(-1, -2)
        attention = scores.masked_fill(~context.mask, -torch.inf).softmax(dim=-1)
        return _View(features, queries[..., : self._nope], keys, attention, latent.shape[-1], *turn)

    def _push(self, view: _View, change: _Change) -> Tensor:
        """J on a direction: the change of the output [w, T, X]."""
        moved = torch.einsum("wty,hqy->whtq", view.features, change.queries)
        latent_rows = moved[..., : self._nope] @ self._w_uk + view.q_nope @ change.keys
        rows = torch.cat([latent_rows, rotate(moved[..., self._nope :], view.cos, view.sin)], dim=-1)
        scores = self._context.softmax_scale * rows @ view.keys.unsqueeze(1).transpose(-1, -2)
        attended = view.centred(scores) @ view.latent.unsqueeze(1)
        return torch.einsum("whtr,hxr->wtx", attended, self._maps_HXR)

    def _pull_back(self, view: _View, output: Tensor) -> _Change:
        """Jᵀ on a change of the output [w, T, X]."""
        rows = torch.einsum("wtx,hxr->whtr", output, self._maps_HXR)
        scores = view.centred(rows @ view.latent.unsqueeze(1).transpose(-1, -2))
        met = self._context.softmax_scale * scores @ view.keys.unsqueeze(1)  # [w, H, T, R+P]
        latent, rope = met.split([view.rank, met.shape[-1] - view.rank], dim=-1)
        queries = torch.cat([latent @ self._w_uk.transpose(1, 2), rotate(rope, view.cos, -view.sin)], dim=-1)
        return _Change(
            torch.einsum("whtn,whtr->hnr", view.q_nope, latent),
            torch.einsum("whtq,wty->hqy", queries, view.features),
        )


@dataclass(frozen=True)
class _View:
    """One part through the present layer: features [w, T, Y], q_nope [w, H, T, N], keys [w, T, R+P] (latent, rotated key),
    attention weights [w, H, T, T]; cos and sin [1 or w, 1, T, P]."""

    features: Tensor
    q_nope: Tensor
    keys: Tensor
    attention: Tensor
    rank: int
    cos: Tensor
    sin: Tensor

    @property
    def latent(self) -> Tensor:
        return self.keys[..., : self.rank]

    def centred(self, scores: Tensor) -> Tensor:
        """What a change of scores does to the attention weights, to first order; its own adjoint."""
        weighted = self.attention * scores
        return weighted - self.attention * weighted.sum(dim=-1, keepdim=True)


class _Metric:
    """Kronecker factors of the diagonal blocks: for W_UK moments of un-rotated queries ⊗ of attended latents about their mean,
    for queries moments of attended keys about their mean ⊗ of the features, each head by what its scores weigh."""

    def __init__(self, w_uk: Tensor, q_HQY: Tensor) -> None:
        heads, nope, rank = w_uk.shape
        self._w_uk = w_uk
        self._rope = q_HQY.shape[1] - nope
        self._weight = w_uk.new_zeros(heads)
        self._spread = w_uk.new_zeros(heads, rank + self._rope, rank + self._rope)
        self._q_nope = w_uk.new_zeros(heads, nope, nope)
        self._features = w_uk.new_zeros(q_HQY.shape[2], q_HQY.shape[2])

    def add(self, view: _View, weights_WT: Tensor, maps_HXR: Tensor) -> None:
        received = (view.attention * weights_WT[:, None, :, None]).sum(dim=2)  # [w, H, T]
        means = view.attention @ view.keys.unsqueeze(1)
        self._spread += torch.einsum("wht,wtk,wtl->hkl", received, view.keys, view.keys)
        self._spread -= torch.einsum("wt,whtk,whtl->hkl", weights_WT, means, means)
        self._q_nope += torch.einsum("wt,whtn,whtm->hnm", weights_WT, view.q_nope, view.q_nope)
        self._features += torch.einsum("wt,wtx,wty->xy", weights_WT, view.features, view.features)
        self._maps = maps_HXR

    def finished(self) -> _Metric:
        """Inverses; the spread of the un-rotated keys is that of the latents through W_UK."""
        rank = self._w_uk.shape[2]
        lift = torch.zeros(*self._w_uk.shape[:1], self._w_uk.shape[1] + self._rope, rank + self._rope).to(self._w_uk)
        lift[:, : self._w_uk.shape[1], :rank] = self._w_uk
        lift[:, self._w_uk.shape[1] :, rank:] = torch.eye(self._rope).to(self._w_uk)
        latent = self._spread[:, :rank, :rank]
        # how much a unit squared score error of the head weighs in the output
        weight = torch.einsum("hxr,hrs,hxs->h", self._maps, latent, self._maps)
        weight = (weight / weight.sum().clamp_min(1e-30))[:, None, None]
        self._factors = (
            _damped(self._q_nope * weight),
            _damped(latent),
            _damped(lift @ self._spread @ lift.transpose(1, 2) * weight),
            _damped(self._features),
        )
        self._inverses = tuple(torch.linalg.inv(factor.double()).to(factor.dtype) for factor in self._factors)
        return self

    def times(self, change: _Change) -> _Change:
        queries, latent, keys, features = self._factors
        return _Change(queries @ change.keys @ latent, keys @ change.queries @ features)

    def solve(self, change: _Change) -> _Change:
        queries, latent, keys, features = self._inverses
        return _Change(queries @ change.keys @ latent, keys @ change.queries @ features)

    def square(self, change: _Change) -> float:
        return change.dot(self.times(change))


def _damped(moments: Tensor) -> Tensor:
    """Positive definite: with a share of the mean diagonal added (and something where all is zero)."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].clamp_min(1e-20)
    return moments + _DAMPING * mean * torch.eye(moments.shape[-1]).to(moments)

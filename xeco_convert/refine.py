"""`--refine`: improves converted layers one at a time from unlabelled text (docs/conversion.md, steps 5 and 8).

Each layer sees the hidden states that the converted layers below produce and aims at the source's own, so it also repairs
what they got wrong; the error is taken after the layer's feed-forward part. First the closed-form refits on those inputs:
of the value side (W_UV and o_proj), then of the score side (W_UK and the queries) and the value side in turn. Then Adam on
all of the layer's MLA weights. Whatever does best on held-out windows is kept.

Letters: W windows, T tokens, X hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.calibration.stream import LayerView
from xeco_convert.factorize.attention import AttentionContext, mla_output
from xeco_convert.factorize.balance import balance_scales
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.factorize.refit import ValueRefit
from xeco_convert.factorize.refit_scores import ScoreRefit, ScoreTokens

_WARM_UP_STEPS = 10
_SECOND_FROM = 0.8  # of a layer's progress: most layers need no second attempt
_LAST_RATE = 0.02  # of the cosine schedule, as a share of the learning rate
_SCORE_TOKENS = 8192  # for the refit of the score side, which goes over them a dozen times
_SCORE_ROUNDS = 2  # each linear about the last one's result

Share = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """`learning_rate` is for float32 weights with balanced scales. A step takes `batch_tokens` tokens. `seconds` bounds one
    attempt at a layer: its schedule then runs by the clock. (An attempt that fails is repeated once, four times slower.)
    `refit_scores`: whether W_UK and the queries are refitted in closed form before."""

    steps: int = 200
    learning_rate: float = 5e-3
    batch_tokens: int = 2048
    held_out_windows: int = 8
    seconds: float | None = None
    seed: int = 0
    refit_scores: bool = True


@dataclass(frozen=True, kw_only=True)
class RefinedLayer:
    """The best of the stages; `errors`: held-out relative squared error after the layer by stage (start; refit: the value
    side; scores: both sides; regression); `kept`: the stage that `factors` come from."""

    factors: MlaAttention
    errors: dict[str, float]
    kept: str
    seconds: float


class LayerRefinement:
    """The work on one layer: `inputs` [W, T, X] are the converted model's hidden states before it, `view.inputs` the
    source's. `windows`: how many may be looked at; the last `held_out_windows` of them decide what is kept. `context`: where
    the layer has rotary frequencies of its own, or an epsilon for its latent norm."""

    def __init__(
        self,
        view: LayerView,
        num_heads: int,
        inputs: Tensor,
        windows: int,
        options: RefineOptions,
        context: AttentionContext | None = None,
    ) -> None:
        self._view = view
        self._inputs = inputs
        self._options = options
        self._heads = num_heads
        self._context = view.context() if context is None else context
        held_out = max(1, min(options.held_out_windows, windows // 8))
        self._trained, self._held_out = slice(0, windows - held_out), slice(windows - held_out, windows)
        self._batch = max(1, options.batch_tokens // inputs.shape[1])
        self._scale = self._added_square()

    @torch.no_grad()
    def _added_square(self) -> float:
        """Mean square of what the source's layer adds to the residual stream, tokens weighed as in `_error`."""
        added, counted = 0.0, 0
        for part in self._parts(slice(0, self._held_out.stop)):
            counts = self._view.counts[part]
            squares = (self._view.outputs[part] - self._view.inputs[part]).square().mean(dim=-1)
            added += float((squares * self._view.output_weights(part))[counts].sum())
            counted += int(counts.sum())
        return added / counted

    def run(self, start: MlaAttention, on_progress: Share = lambda share: None) -> RefinedLayer:
        """Refit, regress, choose. `on_progress` is told the share done."""
        began = time.monotonic()
        stages = {"start": start, "refit": self._refit(start)}
        errors = {name: self.held_out_error(factors) for name, factors in stages.items()}
        kept = min(errors, key=lambda name: errors[name])
        if self._options.refit_scores and _scores_are_plain(start, self._context):
            stages["scores"], errors["scores"] = self._refit_both(stages[kept], errors[kept])
            kept = "scores" if errors["scores"] < errors[kept] else kept
        attempts = ((self._options.learning_rate, 0.0), (self._options.learning_rate / 4, _SECOND_FROM))
        for rate, done in attempts:
            share = _SECOND_FROM if done == 0 else 1 - _SECOND_FROM
            tell = lambda step, done=done, share=share: on_progress(done + share * step)  # noqa: E731
            stages["regression"] = self._regress(balance_scales(stages[kept], self._heads), rate, tell)
            errors["regression"] = self.held_out_error(stages["regression"])
            if errors["regression"] < errors[kept]:
                kept = "regression"
                break  # else once more, four times slower
        return RefinedLayer(factors=stages[kept], errors=errors, kept=kept, seconds=time.monotonic() - began)

    def probe(self, start: MlaAttention) -> tuple[MlaAttention, float]:
        """The regression alone, once, for the survey of widths: the better of its result and the start, and the share of the
        start's held-out error that is left."""
        before = self.held_out_error(start)
        factors = self._regress(balance_scales(start, self._heads), self._options.learning_rate)
        after = self.held_out_error(factors)
        return (factors, after / before) if after < before else (start, 1.0)

    @torch.no_grad()
    def _refit(self, start: MlaAttention) -> MlaAttention:
        """Value side by least squares, towards the source's hidden states after attention."""
        refit = ValueRefit(start, self._heads, self._context)
        for part in self._parts(self._trained):
            # the last eighth chooses the ridge, but something must be left to fit
            held_out = part.start > 0 and part.stop > self._trained.stop - self._trained.stop // 8
            refit.add(
                self._view.normed(self._inputs[part]),
                self._view.counts[part],
                target_WTX=self._wanted(part),
                weights_WT=self._view.token_weights(part),
                held_out=held_out,
            )
        return refit.result()

    @torch.no_grad()
    def _refit_both(self, start: MlaAttention, error: float) -> tuple[MlaAttention, float]:
        """Score side, then value side, in turn as long as the held-out error falls; the result and its error."""
        windows = slice(0, min(self._trained.stop, max(1, _SCORE_TOKENS // self._inputs.shape[1])))
        tokens = [self._score_tokens(part) for part in self._parts(windows, 1)]
        best, least = start, error
        seconds = self._options.seconds
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        for _ in range(_SCORE_ROUNDS):
            before = least
            for factors in ScoreRefit(best, self._heads, self._context, tokens).offers():
                remaining = self.held_out_error(factors)
                if remaining < least:
                    best, least = factors, remaining
                if time.monotonic() > deadline:
                    break
            if least == before or time.monotonic() > deadline:
                break
            values = self._refit(best)
            remaining = self.held_out_error(values)
            if remaining < least:
                best, least = values, remaining
        return best, least

    def _score_tokens(self, part: slice) -> ScoreTokens:
        weights = torch.where(self._view.counts[part], self._view.token_weights(part), 0.0)
        inputs = self._view.normed(self._inputs[part])
        return ScoreTokens(inputs=inputs, weights=weights, target=self._wanted(part))

    def _wanted(self, part: slice) -> Tensor:
        """What leads from the converted model's states to the source's hidden states after attention [w, T, X]."""
        return self._view.attention_target(part, self._inputs[part])

    @torch.no_grad()
    def held_out_error(self, factors: MlaAttention) -> float:
        """Relative squared error after the layer on windows that nothing was fitted to."""
        parts = list(self._parts(self._held_out))
        sums = [float(self._error(factors, part)) * int(self._view.counts[part].sum()) for part in parts]
        total = sum(sums) / max(1, int(self._view.counts[self._held_out].sum()))
        return total if math.isfinite(total) else math.inf

    def _error(self, factors: MlaAttention, part: slice | Tensor) -> Tensor:
        """Mean squared error of the hidden states after the layer, relative to what the source's layer adds; tokens count by
        `LayerView.output_weights`."""
        inputs = self._inputs[part]
        attention = mla_output(factors, self._heads, self._view.normed(inputs), self._context)
        error = self._view.run_with_attention(inputs, attention) - self._view.outputs[part]
        weighed = error.square().mean(dim=-1) * self._view.output_weights(part)
        return weighed[self._view.counts[part]].mean() / self._scale

    def _regress(
        self, start: MlaAttention, learning_rate: float, on_progress: Share = lambda share: None
    ) -> MlaAttention:
        """Adam on every weight; the learning rate warms up, then follows a cosine."""
        options = self._options
        parameters = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in start.tensors().items()}
        optimizer = torch.optim.Adam(list(parameters.values()), lr=learning_rate, betas=(0.9, 0.95))
        batches = _shuffled(self._trained.stop, self._batch, options.seed)
        began = time.monotonic()
        for step in range(options.steps):
            progress = step / options.steps
            if options.seconds is not None:
                progress = max(progress, (time.monotonic() - began) / options.seconds)
            if progress >= 1:
                break
            on_progress(progress)
            cosine = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / _WARM_UP_STEPS) * cosine
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = self._error(start.with_tensors(parameters), next(batches))
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return start.with_tensors({name: tensor.detach() for name, tensor in parameters.items()})

    def _parts(self, windows: slice, size: int | None = None) -> Iterator[slice]:
        step = size or self._batch
        for first in range(windows.start, windows.stop, step):
            yield slice(first, min(first + step, windows.stop))


def _scores_are_plain(mla: MlaAttention, context: AttentionContext) -> bool:
    """Whether scores are linear in W_UK and in the query weights, which the refit of the score side takes for granted."""
    return mla.q_norm_weight is None and context.logit_softcap is None


def _shuffled(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches of the window numbers below `count`, every window at most once in a pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(1, count - batch + 1), batch):  # an incomplete last batch is left out
            yield order[start : start + batch]

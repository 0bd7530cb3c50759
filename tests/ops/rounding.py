"""How far rounding moves the results of latent attention: from the formula alone, whatever the machine or its BLAS.

Every step is taken in float64 together with the variance that roundings give it, taken as independent (Higham and Mary,
SIAM J. Sci. Comput. 41, 2019): a float32 number is off by up to ε/2 of itself, evenly spread, ε²/12 in the mean square. A
sum is taken as the least careful that is honest: one accumulator, its n products t rounded by themselves, in any order,
whose partial sums have the mean square n·(Σt²/6 + (Σt)²/3). Tiles, registers and fused products are at most that. So the
root mean square of an error over what is predicted here is about 1 or less for right code; what was seen stands beside
`MOST`.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from operands import Sizes, rms, schema_order
from torch import Tensor

from xeco_convert.ops._latent_attention import visible_tokens

# What errors may be over what is predicted: the root mean square of a result, and its worst number.
# Seen on an AMD EPYC (Zen 5, AVX-512 BF16), over all tests of the ops and all levels: up to 1.09, and 3.3. A level sums in one
# order on whatever processor, so the same is expected of an Intel Xeon (not measured); BLAS differs, and takes no part.
MOST, WORST = 2.0, 8.0

SINGLE = torch.finfo(torch.float32).eps ** 2 / 12
FUNCTION = 4 * SINGLE  # exp, log and tanh: two units in the last place


class Rounded(NamedTuple):
    """Numbers, and the variance of each."""

    value: Tensor
    variance: Tensor

    def stored(self, dtype: torch.dtype) -> Rounded:
        """After one rounding to a dtype, below its normal numbers too."""
        info = torch.finfo(dtype)
        rounded = self.off_by(info.eps**2 / 12)
        return Rounded(rounded.value, rounded.variance + (info.smallest_normal * info.eps) ** 2 / 12)

    def off_by(self, relative: Tensor | float) -> Rounded:
        """With one more error, of this variance relative to the square of the number."""
        return Rounded(self.value, self.variance + relative * self.value.square())

    def times(self, factor: Tensor | float) -> Rounded:
        """Times what is exact."""
        return Rounded(self.value * factor, self.variance * factor**2)


def exactly(value: Tensor) -> Rounded:
    return Rounded(value, torch.zeros_like(value))


def contract(equation: str, one: Rounded, other: Rounded) -> Rounded:
    """einsum in float32. Products with zero are no terms."""
    value = torch.einsum(equation, one.value, other.value)
    squares = [x.value.square() for x in (one, other)]
    of_terms = torch.einsum(equation, *squares)
    count = torch.einsum(equation, *((x.value != 0).double() for x in (one, other)))
    passed_on = torch.einsum(equation, one.variance, squares[1]) + torch.einsum(equation, squares[0], other.variance)
    return Rounded(value, passed_on + SINGLE * (of_terms + count * (of_terms / 6 + value.square() / 3)))


class Attention(NamedTuple):
    """The forward pass [B, H, Q, T]. `slope`: of the soft cap. `total` [B, H, Q]: the sum of the exponentials."""

    scores: Rounded
    slope: Tensor
    exponentials: Rounded
    total: Rounded
    lse: Rounded
    out: Rounded


def predicted(
    tensors: list[Tensor],
    sizes: Sizes,
    rule: dict[str, Any],
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
) -> list[Rounded]:
    """out [B, Q, H, R] and lse [B, H, Q] (0 where a query sees nothing), in float64, and the errors to expect of them in
    the dtype of the inputs; then the four gradients for gradients of both."""
    order, exact = schema_order(sizes, rule), [x.detach().double() for x in tensors]
    forward = _forward(exact, order, tensors[0].dtype)
    results = [Rounded(*(x.transpose(1, 2) for x in forward.out)), forward.lse]
    if d_out is not None and d_lse is not None:
        results += _gradients(exact, order, tensors[0].dtype, d_out.double(), d_lse.double())
    return results


def assert_rounded_as_predicted(found: Sequence[Tensor], expected: Sequence[Rounded]) -> None:
    """error ≤ MOST · what is predicted in the root mean square of each result, and WORST · it in any number of it."""
    for number, (one, right) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == right.value.shape
        error, allowed = (one.detach().double() - right.value).abs(), right.variance.sqrt()
        assert rms(error) <= MOST * rms(allowed), (
            f"result {number}: error {rms(error):.3g}, expected {rms(allowed):.3g}, size {rms(right.value):.3g}"
        )
        far = error > WORST * allowed
        assert not far.any(), f"result {number}: {int(far.sum())} of {far.numel()} numbers are beyond {WORST} times"


def _forward(tensors: list[Tensor], order: list[Any], dtype: torch.dtype) -> Attention:
    """`tensors`: the inputs in float64; `order`: the rule as the op takes it (operands.schema_order)."""
    q_latent, q_rope, c_kv, k_rope = tensors
    starts, ends, positions, scale, causal, window, softcap = order
    visible = visible_tokens(q_latent, c_kv, starts, ends, positions, causal, window).unsqueeze(1)
    q_BQHC, k_BTC = torch.cat([q_latent, q_rope], dim=-1), torch.cat([c_kv, k_rope], dim=-1)
    scores = contract("bqhc,btc->bhqt", exactly(q_BQHC), exactly(k_BTC)).off_by(SINGLE).times(scale)
    slope = torch.ones_like(scores.value)
    if softcap:
        capped = torch.tanh(scores.value / softcap)
        slope = 1 - capped.square()
        scores = Rounded(softcap * capped, scores.variance * slope.square() + FUNCTION * softcap**2)
    masked = scores.value.masked_fill(~visible, -torch.inf)
    largest = masked.amax(dim=-1, keepdim=True) if masked.shape[-1] else masked.new_zeros(*masked.shape[:-1], 1)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    below = (scores.value - largest).masked_fill(~visible, 0.0)
    exponentials = exactly((masked - largest).exp()).off_by(_of_exp(scores, below))
    total = contract("bhqt,bhqt->bhq", exponentials, exactly(visible.double().expand_as(masked)))
    sees = total.value > 0
    safe = total.value.masked_fill(~sees, 1.0)
    lse = (safe.log() + largest.squeeze(-1)).masked_fill(~sees, 0.0)
    lse_variance = total.variance / safe.square() + FUNCTION + SINGLE * (lse.square() + largest.squeeze(-1).square())
    weighted = contract("bhqt,btr->bhqr", exponentials.stored(dtype), exactly(c_kv)).times(1 / safe.unsqueeze(-1))
    out = weighted.off_by((total.variance / safe.square()).unsqueeze(-1) + SINGLE).stored(dtype)
    return Attention(scores, slope, exponentials.times(1 / safe.unsqueeze(-1)), total, Rounded(lse, lse_variance), out)


def _of_exp(scores: Rounded, argument: Tensor) -> Tensor:
    """Relative variance of exp(score - something): of the score, of the difference, of its way to base 2, of the function
    itself and of one rescaling to a larger maximum."""
    return scores.variance + 2 * SINGLE * argument.square() + 2 * FUNCTION


def _gradients(
    tensors: list[Tensor], order: list[Any], dtype: torch.dtype, d_out: Tensor, d_lse: Tensor
) -> list[Rounded]:
    """Of q_latent, q_rope, c_kv and k_rope, for these gradients of out [B, Q, H, R] and lse [B, H, Q], in float64."""
    q_latent, q_rope, c_kv, k_rope = tensors
    forward = _forward(tensors, order, dtype)
    scale, rank = order[3], q_latent.shape[-1]
    q_BQHC, k_BTC = torch.cat([q_latent, q_rope], dim=-1), torch.cat([c_kv, k_rope], dim=-1)
    d_out_BHQR = exactly(d_out.transpose(1, 2))
    weights = exactly(forward.exponentials.value)
    weights = weights.off_by(_of_exp(forward.scores, forward.scores.value - forward.lse.value.unsqueeze(-1)))
    of_row = (forward.lse.variance + SINGLE * forward.lse.value.square()).unsqueeze(-1)
    d_weights = contract("bhqr,btr->bhqt", d_out_BHQR, exactly(c_kv))
    delta = contract("bhqr,bhqr->bhq", d_out_BHQR, forward.out)
    inner = d_weights.value - (delta.value - d_lse).unsqueeze(-1)
    rounding = d_weights.variance + 2 * SINGLE * (d_weights.value.square() + delta.value.square().unsqueeze(-1))
    d_scores = Rounded(weights.value * inner, weights.variance * inner.square() + weights.value.square() * rounding)
    capped = d_scores.times(forward.slope)
    if order[6]:
        capped = Rounded(capped.value, capped.variance + 4 * FUNCTION * d_scores.value.square())
    moved = weights.value * forward.slope  # by an error of delta, the same for a whole row
    stored = capped.stored(dtype).off_by(2 * SINGLE)
    shared = stored.off_by(of_row)
    of_keys = Rounded(stored.value, shared.variance + moved.square() * delta.variance.unsqueeze(-1))
    d_q = contract("bhqt,btc->bqhc", stored, exactly(k_BTC))
    row_BQH1, delta_BQH1 = of_row.transpose(1, 2), delta.variance.transpose(1, 2).unsqueeze(-1)
    common = torch.einsum("bhqt,btc->bqhc", moved, k_BTC).square() * delta_BQH1
    d_q = Rounded(d_q.value, d_q.variance + row_BQH1 * d_q.value.square() + common).times(scale).stored(dtype)
    d_k = contract("bhqt,bqhc->btc", of_keys, exactly(q_BQHC)).times(scale)
    d_values = contract("bhqt,bhqr->btr", weights.off_by(of_row).stored(dtype), d_out_BHQR)
    d_c = Rounded(d_k.value[..., :rank] + d_values.value, d_k.variance[..., :rank] + d_values.variance)
    d_k_rope = Rounded(d_k.value[..., rank:], d_k.variance[..., rank:])
    d_q_parts = [Rounded(d_q.value[..., part], d_q.variance[..., part]) for part in (slice(rank), slice(rank, None))]
    return [*d_q_parts, d_c.off_by(SINGLE).stored(dtype), d_k_rope.off_by(SINGLE).stored(dtype)]

"""The op xeco::latent_attention: attention of all heads over one shared latent, forward and backward.

Schema, reference written from the formula, fake and autograd; the kernels are in csrc/latent_attention/. Where no
compiled kernel serves a device or dtype, the reference does.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from xeco_convert.ops.checks import (
    check_attention_inputs,
    check_integers,
    check_rule,
    check_tensor,
    check_values,
    run_checked,
)
from xeco_convert.ops.extension import first_loaded_for, runs_in_reference

_OP = "latent_attention"
_MAX_POSITION = 2**40  # query positions beyond it could overflow in sums
_LIBRARY = torch.library.Library("xeco", "FRAGMENT")
_INPUTS = "Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope"
_RULE = (
    "Tensor? starts, Tensor? ends, Tensor? query_positions, float softmax_scale, bool causal, int window, float softcap"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(f"latent_attention({_INPUTS}, {_RULE}) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"latent_attention_backward(Tensor d_out, Tensor? d_lse, {_INPUTS}, Tensor out, Tensor lse, {_RULE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


class Rule(NamedTuple):
    """Which tokens each query sees and how scores become logits: the schema's arguments behind the tensors, in its order.

    starts, ends, query_positions int64 [B] or None; window 0: none; softcap 0: none.
    """

    starts: Tensor | None
    ends: Tensor | None
    query_positions: Tensor | None
    softmax_scale: float
    causal: bool
    window: int
    softcap: float


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale · (q_latent · c_kvᵀ + q_rope · k_ropeᵀ)) · c_kv, for every head over the same latents.

    q_latent [B, Q, H, R] = q_nope · W_UK and q_rope [B, Q, H, P] rotated; c_kv [B, T, R] and k_rope [B, T, P] rotated: one
    dtype (float32, bfloat16, float16; float64 runs in the reference) and one device. Any strides, the last dimension dense:
    views are read in place. R from 1 to 512, P from 1 to 128; Q and T may be 0.

    starts, ends, query_positions: int64 [B]; None stands for 0, T and T − Q. Query i of sequence b stands at position
    query_positions[b] + i and sees token t if starts[b] ≤ t < ends[b], if t is not behind its position (`causal`) and if it
    is among the last `window` tokens up to that position (needs `causal`). softcap c bounds scores: c · tanh(score / c).

    Returns out [B, Q, H, R], contiguous, in the dtype of the queries, and lse [B, H, Q] in float32 (float64 for float64):
    the natural logarithm of the sum of the exponentials of the scores. A query that sees nothing gets zeros and −∞. Both
    have gradients, which are the same in every run. Memory besides the results is O(1) in Q and T.

    Raises `ValueError` for shapes, dtypes, devices and settings that do not fit, `ValueError` or `RuntimeError` for ranges
    outside the cache.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2, with W_UK absorbed into the query and W_UV left outside; online
    softmax and recomputation from lse: FlashAttention-2 (arXiv 2307.08691).
    """
    rule = Rule(starts, ends, query_positions, float(softmax_scale), causal, window or 0, float(softcap or 0.0))
    arguments = (q_latent, q_rope, c_kv, k_rope, *rule)
    if runs_in_reference(q_latent):
        _check_public(*arguments)
        return latent_attention_reference(*arguments)
    return cast(tuple[Tensor, Tensor], run_checked(torch.ops.xeco.latent_attention, _check_public, arguments))


def latent_attention_reference(
    q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """The op written from the formula, in float32 or better; differentiable as it stands. Scores take O(Q · T) memory.

    settings: the fields of `Rule`.
    """
    rule = Rule(*settings)
    visible_BQT = _visible(q_latent, c_kv, rule)
    latents, keys = _seen_rows(c_kv, visible_BQT), _seen_rows(k_rope, visible_BQT)
    scores_BHQT = _scores(q_latent, q_rope, latents, keys, rule)
    scores_BHQT = scores_BHQT.masked_fill(~visible_BQT.unsqueeze(1), -torch.inf)
    lse_BHQ = scores_BHQT.logsumexp(dim=-1)
    weights_BHQT = _weights(scores_BHQT, lse_BHQ)
    out = torch.einsum("bhqt,btr->bqhr", weights_BHQT, latents).to(q_latent.dtype)
    return out.contiguous(), lse_BHQ


def latent_attention_backward_reference(
    d_out: Tensor,
    d_lse: Tensor | None,
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    out: Tensor,
    lse: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_latent, q_rope, c_kv and k_rope, written from the formula, in float32 or better.

    With W the weights exp(S − lse): dW = d_out · c_kvᵀ, dS = W · (dW − rowsum(d_out · out) + d_lse), times the slope of the
    soft-cap and the scale; d_q = dS · rows, d_rows = dSᵀ · q, and Wᵀ · d_out for c_kv, which is also the value.
    settings: the fields of `Rule`.
    """
    rule = Rule(*settings)
    visible_BQT = _visible(q_latent, c_kv, rule)
    latents, keys = _seen_rows(c_kv, visible_BQT), _seen_rows(k_rope, visible_BQT)
    scores_BHQT = _scores(q_latent, q_rope, latents, keys, rule)
    weights_BHQT = _weights(scores_BHQT.masked_fill(~visible_BQT.unsqueeze(1), -torch.inf), lse)
    d_out = d_out.to(latents.dtype)
    delta_BHQ = (d_out * out).sum(dim=-1).transpose(1, 2)
    if d_lse is not None:
        delta_BHQ = delta_BHQ - d_lse
    d_scores = weights_BHQT * (torch.einsum("bqhr,btr->bhqt", d_out, latents) - delta_BHQ.unsqueeze(-1))
    if rule.softcap > 0:
        d_scores = d_scores * (1 - (scores_BHQT / rule.softcap).square())
    d_scores = d_scores * rule.softmax_scale
    d_c_kv = torch.einsum("bhqt,bqhr->btr", d_scores, q_latent.to(latents.dtype))
    d_c_kv = d_c_kv + torch.einsum("bhqt,bqhr->btr", weights_BHQT, d_out)
    gradients = (
        torch.einsum("bhqt,btr->bqhr", d_scores, latents),
        torch.einsum("bhqt,btp->bqhp", d_scores, keys),
        d_c_kv,
        torch.einsum("bhqt,bqhp->btp", d_scores, q_rope.to(latents.dtype)),
    )
    first, second, third, fourth = (gradient.to(q_latent.dtype).contiguous() for gradient in gradients)
    return first, second, third, fourth


def visible_tokens(
    q_latent: Tensor,
    c_kv: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    query_positions: Tensor | None,
    causal: bool,
    window: int,
) -> Tensor:
    """Boolean [B, Q, T]: which tokens each query sees."""
    (batch, num_queries), num_tokens, device = q_latent.shape[:2], c_kv.shape[1], q_latent.device
    token_T = torch.arange(num_tokens, device=device)
    visible = torch.ones(batch, num_queries, num_tokens, dtype=torch.bool, device=device)
    if starts is not None:
        visible = visible & (token_T >= starts[:, None, None])
    if ends is not None:
        visible = visible & (token_T < ends[:, None, None])
    if causal:
        query_Q = torch.arange(num_queries, device=device)
        first: int | Tensor = num_tokens - num_queries if query_positions is None else query_positions[:, None, None]
        position = query_Q[:, None] + first
        visible = visible & (token_T <= position)
        if window > 0:
            visible = visible & (token_T > position - window)
    return visible


def _visible(q_latent: Tensor, c_kv: Tensor, rule: Rule) -> Tensor:
    return visible_tokens(q_latent, c_kv, *rule[:3], rule.causal, rule.window)


def _seen_rows(rows: Tensor, visible_BQT: Tensor) -> Tensor:
    """Rows [B, T, width] in float32 or better, zeros where no query looks: what lies there may be anything, NaN included."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.masked_fill(~visible_BQT.any(dim=1).unsqueeze(-1), 0.0)


def _scores(q_latent: Tensor, q_rope: Tensor, latents: Tensor, keys: Tensor, rule: Rule) -> Tensor:
    """[B, H, Q, T], scaled and capped, not masked."""
    scores = torch.einsum("bqhr,btr->bhqt", q_latent.to(latents.dtype), latents)
    scores = (scores + torch.einsum("bqhp,btp->bhqt", q_rope.to(keys.dtype), keys)) * rule.softmax_scale
    return rule.softcap * torch.tanh(scores / rule.softcap) if rule.softcap > 0 else scores


def _weights(masked_scores_BHQT: Tensor, lse_BHQ: Tensor) -> Tensor:
    """exp(S − lse); a query that sees nothing has lse −∞ and weights of zero."""
    nothing = (lse_BHQ == -torch.inf).unsqueeze(-1)
    return (masked_scores_BHQT - lse_BHQ.unsqueeze(-1).masked_fill(nothing, 0.0)).exp()


def _check(op: str, q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any) -> None:
    check_attention_inputs(op, q_latent, q_rope, c_kv, k_rope)
    check_settings(op, q_latent, Rule(*settings))


def check_settings(op: str, q_latent: Tensor, rule: Rule) -> None:
    """The rule's numbers, and its tensors but for their values."""
    check_rule(op, causal=rule.causal, window=rule.window, softcap=rule.softcap)
    for name in ("starts", "ends", "query_positions"):
        check_integers(op, name, getattr(rule, name), "[B]", (q_latent.shape[0],), q_latent)


def _check_public(*arguments: Any) -> None:
    _check(_OP, *arguments)


def _check_saved(q_latent: Tensor, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    op = "latent_attention_backward"
    batch, num_queries, num_heads, _ = q_latent.shape
    check_tensor(op, "d_out", d_out, "[B, Q, H, R]", tuple(q_latent.shape), q_latent)
    check_tensor(op, "out", out, "[B, Q, H, R]", tuple(q_latent.shape), q_latent)
    check_tensor(op, "lse", lse, "[B, H, Q]", (batch, num_heads, num_queries))
    if d_lse is not None:
        check_tensor(op, "d_lse", d_lse, "[B, H, Q]", (batch, num_heads, num_queries), lse)


def check_ranges(
    op: str, num_tokens: int, starts: Tensor | None, ends: Tensor | None, query_positions: Tensor | None
) -> None:
    """Ranges within a cache of so many tokens. Reads the data."""
    check_values(op, "starts", starts, 0, num_tokens)
    check_values(op, "ends", ends, 0, num_tokens)
    check_values(op, "query_positions", query_positions, -_MAX_POSITION, _MAX_POSITION)


def _forward_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op where no compiled kernel serves; on the CPU the extension is loaded by the first call."""
    q_latent, _, c_kv, _, *ranges = arguments[:7]
    if first_loaded_for(q_latent):
        return cast(tuple[Tensor, Tensor], torch.ops.xeco.latent_attention(*arguments))
    _check(_OP, *arguments)
    check_ranges(_OP, c_kv.shape[1], *ranges)
    return latent_attention_reference(*arguments)


def _backward_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out, d_lse, q_latent, q_rope, c_kv, k_rope, out, lse, *rule = arguments
    if first_loaded_for(q_latent):
        return cast(tuple[Tensor, Tensor, Tensor, Tensor], torch.ops.xeco.latent_attention_backward(*arguments))
    op = "latent_attention_backward"
    _check(op, q_latent, q_rope, c_kv, k_rope, *rule)
    _check_saved(q_latent, d_out, d_lse, out, lse)
    check_ranges(op, c_kv.shape[1], *rule[:3])
    return latent_attention_backward_reference(*arguments)


def fake_attention(q_latent: Tensor) -> tuple[Tensor, Tensor]:
    """Empty results of either op for these queries: out [B, Q, H, R] and lse [B, H, Q]."""
    batch, num_queries, num_heads, rank = q_latent.shape
    lse_dtype = torch.promote_types(q_latent.dtype, torch.float32)
    return (
        q_latent.new_empty(batch, num_queries, num_heads, rank),
        q_latent.new_empty(batch, num_heads, num_queries, dtype=lse_dtype),
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(_OP, *arguments)
    return fake_attention(arguments[0])


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out, d_lse, q_latent, q_rope, c_kv, k_rope, out, lse, *rule = arguments
    _check("latent_attention_backward", q_latent, q_rope, c_kv, k_rope, *rule)
    _check_saved(q_latent, d_out, d_lse, out, lse)
    first, second, third, fourth = (x.new_empty(x.shape) for x in (q_latent, q_rope, c_kv, k_rope))
    return first, second, third, fourth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.rule = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, starts, ends, query_positions, out, lse = ctx.saved_tensors
    if d_out is None and d_lse is None:
        return (None,) * 11
    # the gradient of a sum is one number, expanded: such a last dimension needs a copy
    d_out = torch.zeros_like(out) if d_out is None else dense(d_out)
    d_lse = None if d_lse is None else dense(d_lse)
    gradients = torch.ops.xeco.latent_attention_backward(
        d_out, d_lse, *inputs, out, lse, starts, ends, query_positions, *ctx.rule
    )
    return (*gradients, *(None,) * 7)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension is not dense, as the ops take it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


_LIBRARY.impl("latent_attention", _forward_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("latent_attention_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("xeco::latent_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("xeco::latent_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("xeco::latent_attention", _backward, setup_context=_setup_context, lib=_LIBRARY)

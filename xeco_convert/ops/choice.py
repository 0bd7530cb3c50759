"""Which implementation computes the attention of a converted layer: work is counted, and one function decides.

This file is also written beside the weights of converted checkpoints, as xeco_choice.py: it imports nothing but the
standard library, so that it can be tested, and understood, by itself.

- fused: the compiled kernels over latents (the ops of xeco_convert); scores are never stored.
- absorbed: plain torch over latents, through scaled_dot_product_attention.
- expanded: latents expanded to keys and values, through scaled_dot_product_attention.
- reference: written from the formula, and the one that returns the weights.

scaled_dot_product_attention bounds no scores: where they are capped, absorbed and expanded are written from the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Implementation = Literal["fused", "absorbed", "expanded", "reference"]

# What XECO_ATTENTION may name; sdpa leaves the choice between absorbed and expanded.
NAMES = ("reference", "fused", "sdpa")
# Operations per second of the kernels relative to scaled_dot_product_attention on the same device. CPU: from the ratios of
# `bench_attention.py cases`, 2.0 (float32, Zen 4) to 6.3 (bfloat16, Zen 5) in the forward pass, 1.9 to 4.2 in training. GPU:
# from `bench_gpu_choice.py` on an H100, where flash attention has tensor-core instructions that the kernels do not use.
# About the least of them is taken: rather one call too few for the kernels than one too many.
FUSED_SPEED = {"cpu": 2.0, "cuda": 0.5}
FUSED_TRAINING_SPEED = {"cpu": 2.0, "cuda": 0.24}
MAX_RANK, MAX_ROPE = 512, 128  # of the compiled kernels, as csrc/latent_attention/params.h has them


class AttentionChoiceError(ValueError):
    """XECO_ATTENTION names what there is not, or what cannot compute this call."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention call of one layer, as far as the choice depends on it.

    device_type: as torch names it. kernel_obstacle says in words why no compiled kernel serves the device and dtype,
    mask_obstacle why the mask is no range of tokens for each sequence, weight_obstacle why latents must be expanded through
    kv_b_proj; None where there is nothing in the way. soft_capped: scores are bounded. has_mask: a mask tensor is given, which
    scaled_dot_product_attention works through element by element.
    """

    num_queries: int
    num_tokens: int
    device_type: str = "cpu"
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    needs_gradients: bool = False
    needs_weights: bool = False
    dropout: float = 0.0
    soft_capped: bool = False
    has_mask: bool = False
    kernel_obstacle: str | None = None
    mask_obstacle: str | None = None
    weight_obstacle: str | None = None


class Choice(NamedTuple):
    """The implementation, and the reason in words."""

    implementation: Implementation
    reason: str


def choose(call: AttentionCall, override: str | None = None) -> Choice:
    """Decide for one call; `override` is what XECO_ATTENTION names, or None.

    Raises `AttentionChoiceError` where what is asked for cannot compute the call, with the reason.
    """
    if override is not None and override not in NAMES:
        raise AttentionChoiceError(f"XECO_ATTENTION: expected one of {', '.join(NAMES)}, found '{override}'")
    if override == "fused":
        obstacle = fused_obstacle(call)
        if obstacle is not None:
            raise AttentionChoiceError(f"XECO_ATTENTION=fused cannot serve this call: {obstacle}")
        return Choice("fused", "XECO_ATTENTION=fused")
    if override == "sdpa" and (call.needs_weights or call.soft_capped):
        why = "attention weights are asked for" if call.needs_weights else "it does not bound scores (soft cap)"
        raise AttentionChoiceError(f"XECO_ATTENTION=sdpa cannot serve this call: {why}")
    if call.needs_weights:
        return Choice("reference", "attention weights are asked for, and the others never hold them")
    if override == "reference":
        return Choice("reference", "XECO_ATTENTION=reference")
    if call.weight_obstacle is not None:
        return Choice("expanded", call.weight_obstacle)
    return _fewest_operations(call, may_fuse=override is None and fused_obstacle(call) is None)


def fused_obstacle(call: AttentionCall) -> str | None:
    """Why the compiled kernels cannot compute a call, in words; None where they can."""
    if call.needs_weights:
        return "attention weights are asked for, and the kernels never hold them"
    if call.dropout > 0:
        return "the kernels have no dropout on attention weights"
    if call.kv_lora_rank > MAX_RANK or call.qk_rope_head_dim > MAX_ROPE:
        return f"the kernels take kv_lora_rank up to {MAX_RANK} and qk_rope_head_dim up to {MAX_ROPE}"
    return call.weight_obstacle or call.mask_obstacle or call.kernel_obstacle


def counted_operations(call: AttentionCall) -> dict[Implementation, float]:
    """Operations of one head and sequence: two for each multiplication.

    Over latents 2 (2R + P) for each query and key that see each other, and 2 R (N + V) for each query, which carries it
    to the latents and back; expanded 2 (N + P + V) for each pair, and 2 R (N + V) for each key.
    """
    rank, rope = call.kv_lora_rank, call.qk_rope_head_dim
    width = call.qk_nope_head_dim + call.v_head_dim
    every = call.num_queries * call.num_tokens
    seen = max(call.num_queries, every - call.num_queries * (call.num_queries - 1) // 2)  # causal, queries last
    pairs = every if call.has_mask else seen
    across = 2 * rank * width
    return {
        "fused": 2 * (2 * rank + rope) * seen + across * call.num_queries,
        "absorbed": 2 * (2 * rank + rope) * pairs + across * call.num_queries,
        "expanded": 2 * (width + rope) * pairs + across * call.num_tokens,
    }


def explain(call: AttentionCall, override: str | None = None) -> str:
    """The choice in a sentence, with the counts behind it; or why what is asked for cannot be."""
    try:
        choice = choose(call, override)
    except AttentionChoiceError as error:
        return str(error)
    counts = ", ".join(f"{name} {count:.3g}" for name, count in counted_operations(call).items())
    words = f"{choice.implementation}: {choice.reason} (operations per head and sequence: {counts}"
    words += f"; fused counts as 1/{_fused_speed(call):g})"
    obstacle = fused_obstacle(call)
    return words if obstacle is None or override == "fused" else f"{words}; not fused: {obstacle}"


def _fewest_operations(call: AttentionCall, may_fuse: bool) -> Choice:
    over_latents: Implementation = "fused" if may_fuse else "absorbed"
    if call.num_queries == 1:
        return Choice(over_latents, "one query over a cache: latents are read once and never expanded")
    counts = counted_operations(call)
    latents = counts["fused"] / _fused_speed(call) if may_fuse else counts["absorbed"]
    if latents <= counts["expanded"]:
        return Choice(over_latents, "fewest operations: attending to the latents")
    return Choice("expanded", "fewest operations: expanding the latents once")


def _fused_speed(call: AttentionCall) -> float:
    speeds = FUSED_TRAINING_SPEED if call.needs_gradients else FUSED_SPEED
    return speeds.get(call.device_type, 1.0)  # a device without kernels: nothing is fused there

"""The plan of a conversion in words, and as JSON types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from xeco_convert.families.spec import rope_parameters
from xeco_convert.ranks import Widths

if TYPE_CHECKING:
    from xeco_convert.plan import ConversionPlan


def plan_summary(plan: ConversionPlan) -> dict[str, Any]:
    """The plan as JSON types, as --dry-run --json writes it."""
    headers = plan.output_headers()
    return {
        "model_type": plan.source.model_type,
        "dtype": plan.dtype,
        "ranks_are_final": plan.widths_are_final,
        "layers": [
            {
                "layer": item.layer,
                "converted": item in plan.converted,
                "kv_numbers_before": before,
                "kv_numbers_after": after,
                "kv_bytes_after": size,
            }
            for item, before, after, size in zip(
                plan.layers,
                plan.source_kv_numbers_per_token(),
                plan.kv_numbers_per_token(),
                plan.kv_bytes_per_token(),
                strict=True,
            )
        ],
        "exact_keys": dict(zip(("parameters", "multiplications_per_token"), plan.exact_key_cost(), strict=True)),
        "weights_bytes": sum(header.num_bytes for header in headers),
        "num_tensors": len(headers),
        "dropped": list(plan.dropped),
    }


def show_plan(plan: ConversionPlan, *, on_stdout: bool) -> None:
    source, geometry, options, shape = plan.source, plan.source.geometry, plan.options, plan.converted[0].shape
    lines = [
        f"{source.index.folder}: {source.model_type}, {geometry.num_hidden_layers} layers, "
        f"hidden_size {geometry.hidden_size}, {geometry.num_attention_heads} heads in "
        f"{geometry.num_key_value_heads} key/value groups of head_dim {geometry.head_dim}"
    ]
    query = "" if shape.q_lora_rank is None else f", q_lora_rank {shape.q_lora_rank}"
    lines.append(
        f"{options.init}: {len(plan.converted)} of {len(plan.layers)} layers get {_widths_in_words(plan)}, "
        f"qk_nope_head_dim {shape.qk_nope_head_dim}{query}"
    )
    facts, budget = plan.cache_facts, plan.kv_budget
    before, kept = (numbers * facts.number_bytes for numbers in (facts.numbers_before, facts.numbers_kept))
    after = sum(plan.kv_bytes_per_token()) if budget is None else min(before, budget + kept)
    windows = plan.kept_windows
    if windows:
        lines.append(
            f"{len(windows)} layers keep their sliding window of {windows[0].window} tokens: their cache does not "
            f"grow with the text, and is not counted (--layers 0-{len(plan.layers) - 1} converts them too)"
        )
    if options.portable and plan.portable_rotary_dim < plan.rotary_dim:
        lines.append(_about_scaled_frequencies(plan))
    bound = "" if plan.widths_are_final else "at most "
    parameters, products = plan.exact_key_cost()
    if parameters:
        lines.append(
            f"normalised keys stay exact, computed by the source's own projections and norm before they become latents: {bound}"
            f"{parameters:,} parameters and {products:,} multiplications for each token written more than linear keys "
            "(--qk-norm regression)"
        )
    lines.append(f"KV cache: {before} -> {bound}{after} bytes per token ({after / before:.1%}){_bits_in_words(plan)}")
    if after >= before:
        lines.append("note: this is no smaller than the source's cache; choose a smaller size")
    headers = plan.output_headers()
    lines.append(
        f"weights: {len(headers)} tensors, {bound}{sum(h.num_bytes for h in headers) / 1e9:.3f} GB, {plan.dtype}"
    )
    if plan.dropped:
        lines.append(f"left out: {', '.join(plan.dropped)}")
    for line in lines:
        click.echo(line, err=not on_stdout)


def _bits_in_words(plan: ConversionPlan) -> str:
    """What a cached number is, where it is no number of the model."""
    (latent, rope), *others = plan.cache_facts.bits
    if plan.options.cache_bits == "auto":
        return ", bits chosen for each layer"
    return "" if latent == 16 else f", latents in {latent} bits, rotary keys in {rope}{' or 4' if others else ''}"


def _widths_in_words(plan: ConversionPlan) -> str:
    """The widths of the converted layers, or how they will be chosen."""
    shape = plan.converted[0].shape
    widths = Widths(kv_lora_rank=shape.kv_lora_rank, qk_rope_head_dim=shape.qk_rope_head_dim)
    default = " (default)" if plan.options.rope_dim is None else ""
    return plan.options.policy.describe(plan.cache_facts, widths, default)


def _about_scaled_frequencies(plan: ConversionPlan) -> str:
    """What --portable does where the rotary type leaves only the fastest frequencies as they are."""
    most, kind = plan.portable_rotary_dim, rope_parameters(plan.source.values).get("rope_type")
    chosen = plan.options.rope_dim or 0
    if chosen > most:
        return (
            f"note: rotary type {kind} scales some of the frequencies that --rope-dim {chosen} takes, so only engines that know "
            f"it can load an export: transformers and MLX; --rope-dim {most} suits all"
        )
    return (
        f"rotary frequencies: only the {most // 2} of {plan.rotary_dim // 2} that rotary type {kind} leaves as they are, so that "
        "every engine can load an export (--rank with a wider --rope-dim: transformers and MLX alone)"
    )

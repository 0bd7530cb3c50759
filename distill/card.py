"""What the model card says about healing and evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def replace_section(text: str, title: str, section: str) -> str:
    """The card with the section under `## title` replaced, or put at its end."""
    block = f"## {title}\n\n{section.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        return pattern.sub(lambda _match: f"{block}\n", text).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{block}" if text.strip() else block


def healing_section(healing: dict[str, Any]) -> str:
    """How the model was healed, and its quality before and after."""
    before, after = healing["before"], healing["after"]
    rows = [
        ("perplexity (teacher)", f"{before['perplexity_source']:.4g}", f"{after['perplexity_source']:.4g}"),
        ("perplexity", f"{before['perplexity']:.4g}", f"{after['perplexity']:.4g}"),
        ("KL from the teacher, nats per token", f"{before['kl']:.4f}", f"{after['kl']:.4f}"),
        ("same most likely token as the teacher", f"{before['top1']:.1%}", f"{after['top1']:.1%}"),
    ]
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    return (
        f"Healed by `xeco-distill` (stages {', '.join(healing['stages'])}; {healing['tokens']:,} tokens of {healing['data']}) "
        f"with `{healing['teacher']}` as the teacher. Measured on {after['num_tokens']:,} predictions on text held out:\n\n"
        f"| | before | after |\n|---|---|---|\n{table}\n"
    )


def evaluation_section(results: dict[str, Any]) -> str:
    """What `xeco-distill eval` found."""
    parts = []
    quality = results.get("quality")
    if quality:
        parts.append(
            f"On {quality['num_tokens']:,} predictions of {results['data']}:\n\n| | teacher | this model |\n|---|---|---|\n"
            f"| perplexity | {quality['perplexity_source']:.4g} | {quality['perplexity']:.4g} |\n"
            f"| KL from the teacher, nats per token | | {quality['kl']:.4f} |\n"
            f"| same most likely token | | {quality['top1']:.1%} |\n"
            f"| KV cache, bytes per token | {results['kv_bytes_before']} | {results['kv_bytes_after']} |\n"
        )
    if results.get("needle"):
        rows = "\n".join(
            f"| {row['context']} | {_share(row['teacher']['accuracy'])} | {_share(row['student']['accuracy'])} | "
            f"{row['teacher']['nats']:.3f} | {row['student']['nats']:.3f} |"
            for row in results["needle"]
        )
        parts.append(
            "Needle in a haystack, all depths: share of answers found token by token, and nats per answer token.\n\n"
            f"| context | teacher | this model | teacher, nats | this model, nats |\n|---|---|---|---|---|\n{rows}\n"
        )
    if results.get("tasks"):
        means = {"mean of tasks in files": results["tasks_mean"]} if results.get("tasks_mean") else {}
        rows = "\n".join(
            f"| {task} | {metric} | {_with_error(metrics, metric)} |"
            for task, metrics in {**results["tasks"], **means}.items()
            for metric in metrics
            if not metric.endswith("_stderr")
        )
        parts.append(f"lm-eval {results['lm_eval']}:\n\n| task | metric | value |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _share(value: float) -> str:
    return f"{value:.0%}"


def _with_error(metrics: Mapping[str, float], metric: str) -> str:
    """A metric and, where there is one, its standard error; whole numbers (of rows) as they are."""
    value, error = metrics[metric], metrics.get(f"{metric}_stderr")
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}") if metric != "rows" else f"{value:g}"

"""Tokens per second of `generate`: converted models and their sources, from a cache that is full already.

The cache is filled with random numbers (their values do not change the work), so that only decode steps are timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES, write_checkpoint
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoModelForCausalLM, DynamicCache

from xeco_convert import convert

NEW_TOKENS = 32
_SHARED = Path(os.environ.get("XECO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
_LAYERS_MADE = 4  # of the 1B shape: a decode step costs the same in each


def filled_cache(model: Any, context: int) -> DynamicCache:
    """A cache of `context` tokens: the shapes come from one step of the model."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    filled = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        generator = torch.Generator().manual_seed(number)

        def noise(like: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            shape = (*like.shape[:2], context, like.shape[3])
            return torch.randn(shape, generator=generator).to(like.dtype)

        filled.update(noise(layer.keys), noise(layer.values), number)
    return filled


def seconds_per_token(model: Any, context: int) -> float:
    """One call of `generate` from a full cache."""
    prompt = torch.zeros(1, context + 1, dtype=torch.long)
    cache = filled_cache(model, context)
    start = time.perf_counter()
    model.generate(
        prompt,
        past_key_values=cache,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return (time.perf_counter() - start) / NEW_TOKENS


def checkpoints(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name -> source folder and how it is converted."""
    random = folder / "llama-3.2-1b"
    write_checkpoint(random, SHAPES["llama-3.2-1b"], _LAYERS_MADE)
    return {
        "tinystories-gqa": (_SHARED / "checkpoints/tinystories-gqa", {"rank": 32, "rope_dim": 32}),
        f"random 1B shape, {_LAYERS_MADE} layers": (random, {"rank": 128, "rope_dim": 32}),
    }


@torch.inference_mode()
def run_generate(options: argparse.Namespace) -> int:
    """The table."""
    torch.set_num_threads(options.threads[0])
    machine = machine_facts()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, widths) in checkpoints(Path(folder)).items():
            output = Path(folder) / f"{source.name}-mla"
            with torch.inference_mode(False):
                convert(source, output, init="paper", **widths)
            models = {
                kind: AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
                for kind, path in (("source", source), ("converted", output))
            }
            rows += [_measure(name, models, context, options.repeats) for context in options.contexts]
    print(describe(machine), "")
    cells = [[row[key] for key in ("model", "context", "source", "converted", "ratio")] for row in rows]
    print(format_table(("model", "context", "source, tokens/s", "converted, tokens/s", "ratio"), cells))
    write_json(options.json, {"machine": machine, "new_tokens": NEW_TOKENS, "rows": rows})
    return 0


def _measure(name: str, models: dict[str, Any], context: int, repeats: int) -> dict[str, Any]:
    longest = models["source"].config.max_position_embeddings
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(repeats + 1):
        for kind, model in models.items():
            seconds = seconds_per_token(model, context)
            if turn:
                times[kind].append(seconds)
    speeds = {kind: 1 / statistics.median(values) for kind, values in times.items()}
    note = "" if context + NEW_TOKENS <= longest else f" (beyond the {longest} positions it was trained for)"
    return {"model": name + note, "context": context, **speeds, "ratio": speeds["converted"] / speeds["source"]}

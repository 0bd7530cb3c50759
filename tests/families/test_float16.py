"""A converted model fits into float16 as far as its source does: weights and what they put out stay in the source's range.

Rotary bases and multipliers are those that published models have; a large base makes frequencies that hardly turn, whose
queries and keys the closed form would weigh very differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VARIANTS, build_checkpoint, random_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import xeco_convert

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]
# Llama 2, Llama 3, Qwen2.5 and Gemma 3, SmolLM3, Granite 3.3
BASES = [1e4, 5e5, 1e6, 5e6, 1e7]
WIDE = {"head_dim": 16}
# Granite 3.x as published
GRANITE = {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
GRANITE |= {"logits_scaling": 16.0}
# and widths that float16 products of experts need
PUBLISHED: dict[str, dict[str, Any]] = {"granite": GRANITE, "qwen3_moe": {"moe_intermediate_size": 24}}
PROJECTIONS = ("q_proj", "q_b_proj", "q_head_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
PROJECTIONS += ("kv_a_proj_with_mqa", "kv_b_proj")
# Largest number of the converted attention over the source's. Seen: weights up to 1.8, with a stock structure or factorised
# queries 3.8; what projections put out up to 1.6, with a stock structure 3.0. Without balanced scales: up to 1e5.
MOST = 6.0


def source_with(folder: Path, variant: str, base: float, **changes: Any) -> Path:
    """A tiny checkpoint with this rotary base, for all kinds of layers."""
    build_checkpoint(folder, variant, tokenizer=True, **changes)
    config = json.loads((folder / "config.json").read_text())

    def rebased(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: rebased(value) if isinstance(value, dict) else base if key == "rope_theta" else value
            for key, value in settings.items()
        }

    (folder / "config.json").write_text(json.dumps(rebased(config)))
    return folder


def convert(source: Path, out: Path, **options: Any) -> Path:
    tokens = source.parent / "tokens.json"
    tokens.write_text(json.dumps(random_ids(40, 64, seed=9).tolist()))
    calibrated = {} if options.get("init") == "paper" else {"calibration": str(tokens), "calibration_tokens": 2048}
    xeco_convert.convert(source, out, **{"rank": 12, "rope_dim": 12, "layers": "0-2", **calibrated, **options})
    return out


def largest_weight(folder: Path) -> float:
    """Of the attention projections."""
    weights = load_file(folder / "model.safetensors").items()
    return max(float(x.abs().max()) for name, x in weights if "att" in name and "norm" not in name)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """The largest number that each kind of projection puts out."""
    seen: dict[str, float] = {}
    hooks = []

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = max(seen.get(name, 0.0), float(output.abs().max()))

        return note

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in PROJECTIONS:
            hooks.append(module.register_forward_hook(watch(last)))
    yield seen
    for hook in hooks:
        hook.remove()


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def assert_in_range(source: Path, out: Path) -> None:
    """Weights and outputs against the source's, and logits in float16 against float32."""
    weights = largest_weight(out) / largest_weight(source)
    largest = []
    for folder in (source, out):
        with watched(model := load(folder, torch.float32)) as seen:
            exact = model(random_ids(2, 40)).logits
        largest.append(max(seen.values()))
        half = load(folder, torch.float16)(random_ids(2, 40)).logits
        assert bool(half.isfinite().all()), f"{folder.name} has no logits in float16"
        assert float((half - exact).std() / exact.std()) < 0.02
    assert weights <= MOST, f"weights: {weights:.3g} times the source's"
    assert largest[1] <= MOST * largest[0], f"projections: {largest[1] / largest[0]:.3g} times the source's"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_stays_in_the_range_of_its_source(variant: str, tmp_path: Path) -> None:
    changes = PUBLISHED.get(variant, {})
    source = source_with(tmp_path / "in", variant, BASES[-1], **changes)
    rope = 4 if variant == "llama_mqa" else 12
    assert_in_range(source, convert(source, tmp_path / "out", rope_dim=rope))


@pytest.mark.parametrize(
    ("variant", "base"), [*(("llama", base) for base in BASES), ("granite", BASES[0]), ("granite", BASES[-1])]
)
def test_every_published_base_stays_in_range(variant: str, base: float, tmp_path: Path) -> None:
    changes = {"hidden_size": 64, **WIDE, **(GRANITE if variant == "granite" else {})}
    source = source_with(tmp_path / "in", variant, base, **changes)
    assert_in_range(source, convert(source, tmp_path / "out", rank=32))


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {"init": "paper", "rope_dim": 8},
    "stock structure": {"portable": True},
    "factorised queries": {"q_rank": 24},
    "refined": {"refine": True, "refine_steps": 5},
    "by budget": {"rank": None, "rope_dim": None, "kv_size": "50%"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_initialisation_and_structure_stays_in_range(options: str, tmp_path: Path) -> None:
    family = {"hidden_size": 64, **WIDE, **GRANITE, "attention_bias": False}
    source = source_with(tmp_path / "in", "granite", BASES[-1], **family)
    assert_in_range(source, convert(source, tmp_path / "out", **OPTIONS[options]))

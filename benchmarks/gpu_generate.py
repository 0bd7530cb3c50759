"""Tokens per second of `generate` on this GPU: a model of the 8B shape whose attention was converted, and its source.

    python benchmarks/gpu_generate.py --json benchmarks/results/gpu_generate.json

Random weights, made on the GPU: converting them takes a CPU minutes and changes no time; that the model is the one which a
conversion writes is tested. The cache is full from the start, so that decode steps alone are timed. The cache of the
source's 32 layers and its weights are 85 GB: as many layers are made as the GPU holds, in both models, and the table says
how many. The output head, which is made once, then weighs more than in the whole model, so the ratio is a lower bound.
Exits with 1 where the bound is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_facts import gpu_facts, refuse_without_kernels
from random_checkpoint import SHAPES
from reporting import format_table, machine_facts, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from xeco_convert.modeling.configuration_xeco import family_config_class
from xeco_convert.modeling.layer_xeco import MlaLayer

BOUND = 2.0
_SHARE_OF_MEMORY = 0.8  # the rest: one layer's cache is copied as it grows, logits, the allocator's gaps


@dataclass(frozen=True, kw_only=True)
class GenerateCase:
    """A random model and what is asked of it. `shape`: as config.json has it."""

    shape: Mapping[str, Any]
    batch: int = 16
    context: int = 32768
    rank: int = 128
    rope: int = 32
    new_tokens: int = 32
    repeats: int = 3

    def name(self, num_layers: int) -> str:
        """As it stands in tables."""
        layers = f"{num_layers} of {self.shape['num_hidden_layers']} layers"
        return f"generate, {layers}, B {self.batch}, T {self.context}, R {self.rank}+{self.rope}"

    @property
    def layer_bytes(self) -> int:
        """Weights and cache of one layer of the source in bfloat16."""
        hidden, dim = self.shape["hidden_size"], self.shape["head_dim"]
        keys = self.shape["num_key_value_heads"] * dim
        weights = hidden * (
            2 * self.shape["num_attention_heads"] * dim + 2 * keys + 3 * self.shape["intermediate_size"]
        )
        return 2 * (weights + self.batch * self.context * 2 * keys)

    def layers_that_fit(self, memory_bytes: int) -> int:
        """Of the source, embeddings and head included; at least one."""
        tables = 2 * 2 * self.shape["vocab_size"] * self.shape["hidden_size"]
        fit = int((_SHARE_OF_MEMORY * memory_bytes - tables) // self.layer_bytes)
        return max(1, min(fit, self.shape["num_hidden_layers"]))


def source_config(case: GenerateCase, num_layers: int) -> Any:
    """The source's configuration, shallower."""
    return LlamaConfig(**{**case.shape, "num_hidden_layers": num_layers})


def converted_config(case: GenerateCase, num_layers: int) -> Any:
    """The configuration that a conversion to these widths writes."""
    head_dim = case.shape["head_dim"]
    layer = MlaLayer(
        kv_lora_rank=case.rank, qk_nope_head_dim=head_dim - case.rope, qk_rope_head_dim=case.rope, v_head_dim=head_dim
    )
    shape = {**case.shape, "num_hidden_layers": num_layers, "architectures": ["XecoLlamaForCausalLM"]}
    shape.pop("model_type")
    return family_config_class("Llama")(**shape, mla_layers=[layer.to_dict()] * num_layers)


def random_model(config: Any, device: str) -> Any:
    """In bfloat16."""
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def filled_cache(model: Any, case: GenerateCase) -> DynamicCache:
    """Random numbers for every token of the context: the shapes come from one step of the model."""
    device = model.device
    cache = DynamicCache(config=model.config)
    model(torch.zeros(case.batch, 1, dtype=torch.long, device=device), past_key_values=cache)
    filled = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        filled.update(_noise(layer.keys, case.context), _noise(layer.values, case.context), number)
    return filled


def _noise(like: Tensor, context: int) -> Tensor:
    return torch.randn((*like.shape[:2], context, like.shape[3]), dtype=like.dtype, device=like.device)


def seconds_per_step(model: Any, case: GenerateCase) -> float:
    """Median of calls of `generate` from the full cache, divided by its steps; one call before them is not timed."""
    cache = filled_cache(model, case)
    prompt = torch.zeros(case.batch, case.context + 1, dtype=torch.long, device=model.device)
    mask = torch.ones_like(prompt)
    times = []
    for _ in range(case.repeats + 1):
        if cache.get_seq_length() > case.context:
            cache.crop(case.context - cache.get_seq_length())  # the tokens of the call before
        start = _now()
        model.generate(
            prompt,
            past_key_values=cache,
            attention_mask=mask,
            max_new_tokens=case.new_tokens,
            min_new_tokens=case.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        times.append((_now() - start) / case.new_tokens)
    return statistics.median(times[1:])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def compare(case: GenerateCase, num_layers: int, device: str) -> dict[str, Any]:
    """One line of the table of bench_gpu_attention.py."""
    if device == "cuda":
        os.environ["XECO_ATTENTION"] = "fused"  # not the default until a GPU has run the kernels
    seconds = {}
    for kind, config in (
        ("source", source_config(case, num_layers)),
        ("converted", converted_config(case, num_layers)),
    ):
        seconds[kind] = seconds_per_step(random_model(config, device), case)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    speeds = {kind: case.batch / value for kind, value in seconds.items()}
    ratio = speeds["converted"] / speeds["source"]
    return {
        "case": case.name(num_layers),
        "ms": seconds["converted"] * 1000,
        "figure": speeds["converted"],
        "unit": "tokens/s",
        "against": f"source, {speeds['source']:.4g} tokens/s",
        "share": ratio,
        "at least": BOUND,
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    refuse_without_kernels(parser)
    case = GenerateCase(shape=SHAPES["llama-3.1-8b"])
    machine = machine_facts() | gpu_facts()
    row = compare(case, case.layers_that_fit(torch.cuda.get_device_properties(0).total_memory), "cuda")
    print(format_table(list(row), [list(row.values())]))
    write_json(arguments.json, {"machine": machine, "cases": [row]})
    return 1 if row["share"] < BOUND else 0


if __name__ == "__main__":
    sys.exit(main())

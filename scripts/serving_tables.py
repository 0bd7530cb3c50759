#!/usr/bin/env python3
"""The generated tables of docs/serving.md: python scripts/serving_tables.py puts them in, a test compares them.

Which family vLLM serves comes from the tables of the code and from the last run of scripts/engines.sh with
XECO_ENGINES_RECORD=benchmarks/results/vllm_families.json; how many sequences fit on a GPU from published config.json files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert.families import FamilySpec, supported_model_types
from xeco_convert.modeling import MlaLayer
from xeco_convert.vllm.support import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serving.md"
RECORD = ROOT / "benchmarks" / "results" / "vllm_families.json"
CONFIGS = ROOT / "tests" / "published_configs"
# Name in the table, file and key of its config.json, GPUs of one replica. Llama 3.3 70B has the sizes of 3.1.
MODELS = (
    ("Llama-3.1-8B", "llama", "meta-llama/Llama-3.1-8B", (1,)),
    ("Qwen3-32B", "qwen3", "Qwen/Qwen3-32B", (1, 2)),
    ("Llama-3.3-70B", "llama", "meta-llama/Llama-3.1-70B-Instruct", (2, 4)),
)
SHARES = (0.5, 0.25, 0.125)
ROPE_DIM = 64
CONTEXTS = (8192, 32768)
GPU_GIB = 80
UTILISATION = 0.92  # vLLM's default of --gpu-memory-utilization
ACTIVATIONS_GIB = 2
NUMBER_BYTES = 2  # bfloat16


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def support_matrix(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Every family: vLLM's class that runs it or why none does, what its test gave, and whether an export can hold it."""
    rows = []
    for model_type, spec in supported_model_types().items():
        family = FAMILIES[model_type]
        served = f"`{family.class_name}`" if family.class_name else f"no: {family.refusal}"
        obstacle = export_obstacle(spec)
        export = "with `--portable`" if obstacle is None else f"no: {obstacle}"
        rows.append([f"`{model_type}`", served, device_note(spec), last_run(model_type, record), export])
    return table(
        ["family", "vLLM, as", "on GPUs", "on the CPU, greedy tokens equal to ours (largest Δ)", "export"], rows
    )


def device_note(spec: FamilySpec) -> str:
    """What the attention of GPUs does not do of a family's, by `check_layer`."""
    if not FAMILIES[spec.model_type].class_name:
        return "–"
    if spec.attention_softcap:
        return "refused: soft-capped scores"
    return "written, not run"


def last_run(model_type: str, record: Mapping[str, Mapping[str, Any]]) -> str:
    """Tokens over all models of the family that were tested, and the largest difference of log-probabilities."""
    cases = [case for case in record.values() if case["model_type"] == model_type]
    if not cases:
        return "–"
    tokens = sum(case["tokens"] for case in cases)
    worst = max(case["logprob_difference"] for case in cases)
    return f"{tokens} of {tokens} ({math.ceil(worst * 1e6)}e-6)"


def export_obstacle(spec: FamilySpec) -> str | None:
    """Why no stock model can hold the family, from its file and from the biases of transformers' class."""
    config = AutoConfig.for_model(spec.model_type, num_hidden_layers=1)
    with torch.device("meta"):
        names = set(AutoModelForCausalLM.from_config(config).state_dict())
    biases = [name for name in spec.projections if f"{spec.attention[name].format(layer=0)}.bias" in names]
    return spec.not_portable_because({**config.to_dict(), "sliding_window": None}, biases)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One model on `gpus` GPUs: numbers cached per token on each of them, bytes of weights on each of them."""

    cache_numbers: int
    gpu_cache_numbers: float
    gpu_weight_bytes: float

    def sequences(self, context: int) -> int:
        """Sequences of `context` tokens that the GPUs hold together."""
        free = (GPU_GIB * UTILISATION - ACTIVATIONS_GIB) * 2**30 - self.gpu_weight_bytes
        return max(0, math.floor(free / (self.gpu_cache_numbers * NUMBER_BYTES * context)))


def source_sizes(spec: FamilySpec, config: Any, num_weights: int, gpus: int) -> Sizes:
    """Keys and values lie on the GPU of their head."""
    geometry = spec.geometry(config.to_dict())
    numbers = geometry.num_hidden_layers * geometry.cache_width
    return Sizes(
        cache_numbers=numbers,
        gpu_cache_numbers=numbers / min(gpus, geometry.num_key_value_heads),
        gpu_weight_bytes=num_weights * NUMBER_BYTES / gpus,
    )


def converted_layer(spec: FamilySpec, config: Any, share: float) -> MlaLayer:
    """All layers at `share` of the source's cache, with a rotary key of ROPE_DIM."""
    geometry = spec.geometry(config.to_dict())
    norm = "head" if spec.has_key_norm else None
    return MlaLayer(
        kv_lora_rank=round(share * geometry.cache_width) - ROPE_DIM,
        qk_nope_head_dim=geometry.head_dim,
        qk_rope_head_dim=ROPE_DIM,
        v_head_dim=geometry.head_dim,
        q_norm=norm,
        k_norm=norm,
    )


def converted_sizes(spec: FamilySpec, config: Any, num_weights: int, gpus: int, layer: MlaLayer) -> Sizes:
    """Latents lie whole on every GPU, and so do the projections to them; heads are shared."""
    geometry = spec.geometry(config.to_dict())
    heads = geometry.num_attention_heads + geometry.num_key_value_heads
    source = 2 * heads * geometry.head_dim * geometry.hidden_size  # q and o, k and v
    tensors = {name: math.prod(size) for name, size in layer.in_model(config).tensors().items()}
    whole = sum(count for name, count in tensors.items() if name.startswith(("kv_a", "k_", "v_")))
    shared = sum(tensors.values()) - whole
    layers = geometry.num_hidden_layers
    weights = (num_weights + layers * (shared - source)) / gpus + layers * whole
    numbers = layers * layer.cache_width
    return Sizes(cache_numbers=numbers, gpu_cache_numbers=numbers, gpu_weight_bytes=weights * NUMBER_BYTES)


def published(file: str, key: str) -> tuple[FamilySpec, Any, int]:
    """Family, configuration and number of weights of a published model; nothing is downloaded, no weight is made."""
    values = json.loads((CONFIGS / f"{file}.json").read_text(encoding="utf-8"))[key]
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return supported_model_types()[config.model_type], config, sum(weight.numel() for weight in model.parameters())


def sizing_table() -> str:
    """Bytes per token, and sequences per replica, of large models before and after conversion."""
    header = ["model", "GPUs", "cache", "bytes per token", "weights on a GPU, GiB"]
    header += [f"sequences of {context:,}" for context in CONTEXTS]
    return table(header, [row for model in MODELS for row in sizing_rows(*model)])


def sizing_rows(name: str, file: str, key: str, replicas: tuple[int, ...]) -> Iterator[list[str]]:
    """Source and every share, for every number of GPUs."""
    spec, config, num_weights = published(file, key)
    for gpus in replicas:
        kinds = {"source": source_sizes(spec, config, num_weights, gpus)}
        for share in SHARES:
            layer = converted_layer(spec, config, share)
            label = f"{share:.1%} ({layer.kv_lora_rank} + {layer.qk_rope_head_dim})".replace(".0%", "%")
            kinds[label] = converted_sizes(spec, config, num_weights, gpus, layer)
        for label, sizes in kinds.items():
            weights = f"{sizes.gpu_weight_bytes / 2**30:.1f}"
            counts = [str(sizes.sequences(context)) for context in CONTEXTS]
            yield [name, str(gpus), label, f"{sizes.cache_numbers * NUMBER_BYTES:,}", weights, *counts]


def with_tables(page: str) -> str:
    """The page with its tables made anew; each lies between two comments that name it."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))["cases"] if RECORD.is_file() else {}
    for name, content in (("support", support_matrix(record)), ("sizing", sizing_table())):
        pattern = rf"(<!-- {name} -->\n\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(
            pattern, lambda match, text=content: f"{match[1]}{text}\n\n{match[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(
                f"{PAGE}: expected one place from <!-- {name} --> to <!-- end of {name} -->, found {count}"
            )
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

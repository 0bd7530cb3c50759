"""Checkpoints of the shape of real models with random weights, written one shard at a time.

python benchmarks/random_checkpoint.py llama-3.1-8b OUT --layers-made 2
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# config.json of the real models, as far as shapes and speed go
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_parameters": {**_ROPE, "rope_theta": 500000.0, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "rope_parameters": {**_ROPE, "rope_theta": 500000.0, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
}
_BLOCK_NUMBERS = 2**24  # random numbers drawn at once, in float32: 64 MiB


def layer_shapes(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a decoder layer."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def shard_shapes(config: Mapping[str, Any], num_layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: the embeddings, each layer, the final norm, and the head where it is not tied."""
    table = (config["vocab_size"], config["hidden_size"])
    yield {"model.embed_tokens.weight": table}
    for layer in range(num_layers):
        yield layer_shapes(config, layer)
    yield {"model.norm.weight": (config["hidden_size"],)}
    if not config["tie_word_embeddings"]:
        yield {"lm_head.weight": table}


def write_checkpoint(folder: Path, config: Mapping[str, Any], num_layers: int, seed: int = 0) -> None:
    """Write `num_layers` layers of a model to `folder`: bfloat16, normal weights (norms about 1), one shard in memory."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number, shapes in enumerate(shard_shapes(config, num_layers)):
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})
    _write_index(folder, config, num_layers)


def link_shallower(deep: Path, folder: Path, config: Mapping[str, Any], num_layers: int) -> None:
    """The first `num_layers` layers of the checkpoint `deep` as a checkpoint of their own, on the same files.

    Raises `OSError` where the two folders are on different disks.
    """
    folder.mkdir(parents=True)
    weight_map = json.loads((deep / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for number, shapes in enumerate(shard_shapes(config, num_layers)):
        os.link(deep / weight_map[next(iter(shapes))], folder / _shard_name(number))
    _write_index(folder, config, num_layers)


def _write_index(folder: Path, config: Mapping[str, Any], num_layers: int) -> None:
    shards = list(shard_shapes(config, num_layers))
    weight_map = {name: _shard_name(number) for number, shapes in enumerate(shards) for name in shapes}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    made = {**config, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(made, indent=2), encoding="utf-8")


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of the size that layers of this width have; the scales of norms (vectors) are near one."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    mean, deviation = (1.0, 0.1) if len(shape) == 1 else (0.0, shape[-1] ** -0.5)
    for block in tensor.view(-1).split(_BLOCK_NUMBERS):
        block.copy_(torch.randn(block.shape, generator=generator) * deviation + mean)
    return tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of the shape of a real model.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers-made", type=int, default=2)
    options = parser.parse_args(arguments)
    write_checkpoint(options.folder, SHAPES[options.shape], options.layers_made)


if __name__ == "__main__":
    main()

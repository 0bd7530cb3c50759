"""Tiny random checkpoints of every family and rotary scaling, as files and as modules, and their exact form as MLA.

Weights are large enough that attention is far from uniform: a fault of the rotary embedding or of the scale would be lost
in the average otherwise. Everything is seeded.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.exact import exact_factors, exact_shape
from xeco_convert.families import supported_model_types
from xeco_convert.modeling import code_files, family_config_class, family_model_class
from xeco_convert.modeling.configuration_xeco import auto_map
from xeco_convert.source import open_source
from xeco_convert.source_attention import read_attention

# The beginning of a program that runs where xeco_convert cannot be imported.
WITHOUT_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("xeco_convert", "xeco_distill"):
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Blocked())
"""
ORIGINAL_LENGTH = 16  # positions of the original model in the scaled rotary types
VOCABULARY = 96

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}

# One entry per kind of model: all that differs from _SIZES.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 8},
    "llama_bias": {"model_type": "llama", "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "llama_mha": {"model_type": "llama", "head_dim": 8, "num_key_value_heads": 4},
    "llama_mqa": {"model_type": "llama", "head_dim": 8, "num_key_value_heads": 1},
    "llama_wide_heads": {"model_type": "llama", "head_dim": 12},
    "llama_tied": {"model_type": "llama", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "head_dim": 8, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "qwen3_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": None},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "phi3_partial": {"model_type": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "granite": {
        "model_type": "granite",
        "attention_bias": True,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.6,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "olmo2": {"model_type": "olmo2"},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None, "rotary_pct": 0.5},
    "gpt_neox_sequential": {
        "model_type": "gpt_neox",
        "num_key_value_heads": None,
        "rotary_pct": 1.0,
        "attention_bias": False,
        "use_parallel_residual": False,
    },
}
# Families whose keys are normalised.
KEY_NORM = ("qwen3", "qwen3_bias", "qwen3_moe", "gemma3", "olmo2")

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH},
}


def source_config(variant: str, rope: str = "default", *, old_style: bool = False, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny source. `old_style` writes the rotary settings as transformers 4 did."""
    config = {**_SIZES, **VARIANTS[variant], **changes}
    config = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
    config["architectures"] = [f"{supported_model_types()[config['model_type']].class_prefix}ForCausalLM"]
    settings = {**ROPES[rope], "rope_theta": 100.0}  # a short period: 48 tokens go through many turns
    for name in ("partial_rotary_factor", "rotary_pct"):
        if name in config and not old_style:
            settings["partial_rotary_factor"] = config.pop(name)
    if config["model_type"] == "gemma3_text" and not old_style:
        settings = {"full_attention": settings, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}
    if rope == "dynamic":
        config["max_position_embeddings"] = ORIGINAL_LENGTH  # longer texts change the frequencies
    if not old_style:
        return {**config, "rope_parameters": settings}
    config["rope_theta"] = settings.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    if rope != "default":
        config["rope_scaling"] = {"type": settings.pop("rope_type"), **settings}
    return config


def source_model(variant: str = "llama", rope: str = "default", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A source model in float32 with random weights, biases and norms; `changes` are fields of its configuration."""
    config = source_config(variant, rope, **changes)
    attention = "eager" if config["model_type"] == "gemma2" else "sdpa"  # the only one that caps scores
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention).eval()
    randomise(model, seed)
    return model


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill all weights: scores get a standard deviation of about 2, so that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.get_text_config().hidden_size
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith(".weight"):
            values = (0.0 if "gemma" in model.config.model_type else 1.0) + 0.2 * noise
        elif name.endswith(".bias"):
            values = 0.5 * noise
        elif "embed" in name:
            values = noise
        else:
            strength = 1.4 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value")) else 1.0
            values = strength * noise / width**0.5
        parameter.data.copy_(values)


def build_checkpoint(
    folder: Path,
    variant: str = "llama",
    rope: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    old_style: bool = False,
    tokenizer: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a source checkpoint as it comes from the hub, and return its folder."""
    config = source_config(variant, rope, old_style=old_style, **changes)
    config["torch_dtype" if old_style else "dtype"] = str(dtype).removeprefix("torch.")
    model = source_model(variant, rope, seed=seed, **changes)
    tensors = stored_tensors(model, dtype)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_weights(folder, tensors, num_shards)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def stored_tensors(
    model: PreTrainedModel, dtype: torch.dtype, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """State dict as a checkpoint holds it: tied embeddings once, experts one by one, names of the hub."""
    state = dict(model.state_dict()) if state is None else state
    if get_model_conversion_mapping(model, add_legacy=False):
        state = revert_weight_conversion(model, state)
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
        state.pop("embed_out.weight", None)
    return state


def write_weights(folder: Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """One model.safetensors, or shards with an index."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    step = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number * step : (number + 1) * step]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over VOCABULARY words: w3, w4, ... and the special tokens 0 to 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **settings},
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def make_key_norms_constant(folder: Path, offset: float) -> Path:
    """Give every key the same rms: inputs of constant norm (weights of 1 before the layer; `offset` is what the class adds to
    stored weights) through orthogonal projections, so that the norm of the keys only scales them and their regression is
    exact. The source has two heads of 32 rows in two groups."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("input_layernorm.weight"):
            tensor.fill_(1.0 - offset)
        if name.endswith("self_attn.k_proj.weight") and tensor.shape == (64, 32):
            parts = [torch.linalg.qr(torch.randn(32, 32, generator=generator))[0] for _ in range(2)]
            tensor.copy_(torch.cat(parts))
    write_weights(folder, tensors)
    return folder


def decoder(model: PreTrainedModel) -> Any:
    """The model without its head."""
    return model.base_model


def source_attention(model: PreTrainedModel, layer: int, dtype: torch.dtype | None = None) -> SourceAttention:
    """The weights of one attention layer of a source model, as the factorisations take them: through files, as xeco-convert
    reads them."""
    attention = source_attentions(model)[layer]
    if dtype is None:
        return attention
    moved = {name: value.to(dtype) for name, value in vars(attention).items() if isinstance(value, Tensor)}
    return dataclasses.replace(attention, **moved)


def source_attentions(model: PreTrainedModel) -> list[SourceAttention]:
    """The attention of every layer."""
    count = model.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", json.loads(model.config.to_json_string(use_diff=False)))
        write_weights(Path(folder), stored_tensors(model, torch.float32))
        opened = open_source(CheckpointIndex.open(folder))
        reader = TensorReader(opened.index)
        return [read_attention(opened, reader, layer, torch.device("cpu")) for layer in range(count)]


def random_attention(
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    hidden: int = 32,
    *,
    bias: str = "",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> SourceAttention:
    """One random attention layer; `bias` names the projections that have one, as "qkv"."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = {"q": heads * dim, "k": groups * dim, "v": groups * dim, "o": hidden}
    tensors: dict[str, Tensor | None] = {}
    for which, count in rows.items():
        columns = heads * dim if which == "o" else hidden
        tensors[f"{which}_weight"] = random(count, columns) * 1.3 / columns**0.5
        tensors[f"{which}_bias"] = random(count) * 0.5 if which in bias else None
    return SourceAttention(
        **tensors,  # type: ignore[arg-type]
        input_norm_weight=1 + 0.2 * random(hidden),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
    )


def exact_model(source: PreTrainedModel, layers: list[int] | None = None) -> PreTrainedModel:
    """The source as MLA without any approximation: every rotary row kept, full rank. Other layers keep their attention."""
    prefix = type(source).__name__.removesuffix("ForCausalLM")
    count = source.config.num_hidden_layers
    chosen = range(count) if layers is None else layers
    state = dict(source.state_dict())
    entries: list[dict[str, Any] | None] = [None] * count
    attentions = source_attentions(source)
    family = supported_model_types()[source.config.model_type]
    for layer in chosen:
        shape, factors = exact_shape(attentions[layer]), exact_factors(attentions[layer])
        entries[layer] = {key: value for key, value in shape.to_dict().items() if key != "latent_norm"}
        module = f"{family.module_name(layer)}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(module)}
        state.update({f"{module}{name}": tensor for name, tensor in factors.state_dict().items()})
    fields = {key: value for key, value in source.config.to_dict().items() if key != "model_type"}
    config = family_config_class(prefix)(**fields, mla_layers=[_plain(entry) for entry in entries])
    config._attn_implementation = source.config._attn_implementation
    config.dtype = torch.float32
    model = family_model_class(prefix, "ForCausalLM")(config).eval()
    model.load_state_dict(state)
    return model


def _plain(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}


def save_exact_checkpoint(folder: Path, model: PreTrainedModel) -> Path:
    """Files of a converted model as xeco-convert lays them out, without transformers' save_pretrained."""
    folder.mkdir(parents=True)
    prefix = type(model).__name__.removeprefix("Xeco").removesuffix("ForCausalLM")
    config = json.loads(model.config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {**config, "auto_map": auto_map(prefix), "dtype": "float32"})
    write_weights(folder, stored_tensors(model, torch.float32))
    for name, file in code_files().items():
        (folder / name).write_bytes(file.read_bytes())
    return folder


def random_ids(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids [batch, length] without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

"""vLLM's model classes of converted checkpoints: the class of the source family, its attention exchanged after it is built.

`XecoLlamaForCausalLM` extends vLLM's LlamaForCausalLM, and so on, made on first use. Everything but attention (MLP, experts,
norms, embeddings, pipeline stages, compilation) is vLLM's. Weights of converted layers are loaded here, since each of vLLM's
classes would put q_proj where it has all of q, k and v in one; all others go to its own loader.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import vllm
from torch import Tensor, nn

from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.families import supported_model_types
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX, source_class
from xeco_convert.vllm.attention import VllmLatentAttention
from xeco_convert.vllm.backends import device_kind
from xeco_convert.vllm.rotary import layer_rotary
from xeco_convert.vllm.support import ServingSettings, VllmFamily, architectures, check_layer, check_version


class LatentModelMixin:
    """What a converted model adds to vLLM's class of its source."""

    supports_lora = False  # adapters would reach projections that attention reads past

    def __init__(self, *, vllm_config: Any, prefix: str = "", **named: Any) -> None:
        if not os.environ.get("XECO_VLLM_ANY_VERSION"):
            check_version(vllm.__version__)
        _check_config(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **named)  # type: ignore[call-arg]
        base = f"{prefix}.model" if prefix else "model"
        self._latent_layers = exchange_attention(self.model, vllm_config, base)  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load `weights`, named as in the checkpoint; returns the parameters that got a value."""
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                module, _, below = name.partition(".self_attn.")
                attention = self._latent_layers.get(module)
                if attention is None or not below:
                    yield name, tensor
                else:
                    loaded.add(f"{module}.self_attn.{attention.load_weight(below, tensor)}")

        own = super().load_weights(others())  # type: ignore[misc]
        return loaded | set(own or ())


class RefusedModel(nn.Module):
    """Stands for a model that vLLM cannot serve, so that its sentence reaches the user."""

    refusal = ""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise UnsupportedModelError(f"{type(self).__name__}: {self.refusal}.")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError


def exchange_attention(model: Any, vllm_config: Any, prefix: str) -> dict[str, VllmLatentAttention]:
    """Put latent attention into the converted layers of a decoder that vLLM has just built, and take the source's out of vLLM's
    list of layers with a cache. Returns it by the name of the layer in the checkpoint."""
    config = vllm_config.model_config.hf_config
    spec = supported_model_types()[config.model_type.removeprefix(MODEL_TYPE_PREFIX)]
    values = config.to_dict()
    length = vllm_config.model_config.max_model_len
    settings = ServingSettings(
        device=device_kind(), max_model_len=length, cache_dtype=vllm_config.cache_config.cache_dtype
    )
    latent: dict[str, VllmLatentAttention] = {}
    for number in range(model.start_layer, model.end_layer):
        decoder_layer, layer = model.layers[number], config.layer(number)
        if layer is None:
            _check_kept(number, decoder_layer.self_attn, spec.geometry(values).head_dim)
            if spec.nope_layers and not values[spec.nope_layers][number]:
                decoder_layer.self_attn.rotary_emb = _NoRotation()
            continue
        window = spec.window(values, number)
        check_layer(number, layer, window, settings)
        source, name = decoder_layer.self_attn, f"{prefix}.layers.{number}"
        del vllm_config.compilation_config.static_forward_context[source.attn.layer_name]
        decoder_layer.self_attn = latent[name] = VllmLatentAttention(
            config,
            layer,
            layer_rotary(config, spec.class_prefix, number, layer, length),
            scaling=_softmax_scale(config, spec.class_prefix, number),
            window=window,
            vllm_config=vllm_config,
            prefix=f"{name}.self_attn",
        )
    return latent


def _softmax_scale(config: Any, prefix: str, number: int) -> float:
    """Of transformers' own class: vLLM's Qwen2 has another where config.json gives a head_dim that is not hidden_size / heads."""
    module = sys.modules[source_class(prefix, "ForCausalLM").__module__]
    with torch.device("meta"):
        return float(getattr(module, f"{prefix}Attention")(config, layer_idx=number).scaling)


def _check_kept(number: int, attention: Any, head_dim: int) -> None:
    """Raises `UnsupportedModelError` where vLLM builds a kept layer with other heads than the checkpoint has."""
    if attention.head_dim != head_dim:
        raise UnsupportedModelError(
            f"layer {number} keeps its source's attention, with heads of {head_dim}, and vLLM's {type(attention).__name__} takes "
            f"heads of {attention.head_dim} here; convert every layer, or serve with transformers."
        )


class _NoRotation(nn.Module):
    """In place of the rotary embedding of a kept layer that does not rotate."""

    def forward(self, positions: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return queries, keys


def _check_config(config: Any) -> None:
    """Raises `CheckpointError` for a configuration that is none of a converted model."""
    try:
        for number in range(config.num_hidden_layers):
            config.layer(number)
    except (AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(config).__name__} has no mla_layers"
        raise CheckpointError(
            f"not a folder that xeco-convert wrote ({reason}); convert the model, or serve its source as it is."
        ) from None


def _model_class(name: str, family: VllmFamily) -> Any:
    if family.refusal:
        return type(name, (RefusedModel,), {"__module__": __name__, "refusal": family.refusal})
    module = importlib.import_module(f"vllm.model_executor.models.{family.module}")
    source = getattr(module, family.class_name)
    return type(name, (LatentModelMixin, source), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """`models.XecoLlamaForCausalLM` and its kin, made on first use: by name, as vLLM's registry and unpickling look for them."""
    if name.startswith("Xeco") and name in architectures():
        globals()[name] = _model_class(name, architectures()[name][1])
        return globals()[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")

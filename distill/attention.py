"""Where the converted attention of a student is, in its files and in the model: what its family calls it."""

from __future__ import annotations

from typing import Any

from torch import nn

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.factorize.balance import balance_scales
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.families import FamilySpec, supported_model_types
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX
from xeco_convert.modeling.layer_xeco import MlaLayer, MlaShape


def student_family(model_type: str) -> FamilySpec:
    """The family that a converted model comes from."""
    return supported_model_types()[model_type.removeprefix(MODEL_TYPE_PREFIX)]


def attention_prefixes(student: CheckpointIndex) -> tuple[str, ...]:
    """What the names of the tensors of converted attention begin with, layer by layer: as "model.layers.0.self_attn."."""
    family = student_family(student.config["model_type"])
    entries = enumerate(student.config["mla_layers"])
    return tuple(f"{family.module_name(number)}." for number, entry in entries if entry is not None)


def attention_modules(model: Any) -> dict[int, nn.Module]:
    """The attention modules of a student's converted layers, by the number of the layer."""
    name = student_family(model.config.model_type).module
    layers = enumerate(model.get_decoder().layers)
    return {number: getattr(layer, name) for number, layer in layers if model.config.layer(number) is not None}


def layer_shape(config: Any, number: int) -> MlaShape:
    """Widths of a converted layer, by the student's configuration as transformers reads it."""
    layer: MlaLayer = config.layer(number)
    return layer.in_model(config)


def weights_of(attention: nn.Module, config: Any, number: int) -> MlaAttention:
    """The weights of a converted layer's module, without gradients; they are the module's own, not copies."""
    return MlaAttention.from_module(attention, layer_shape(config, number), f"layer {number}")


def balance_model(model: Any) -> None:
    """Settle the free scales of all converted layers of a model in place; it computes the same."""
    config = model.config
    for number, attention in attention_modules(model).items():
        balanced = balance_scales(weights_of(attention, config, number), config.num_attention_heads)
        attention.load_state_dict(balanced.state_dict())

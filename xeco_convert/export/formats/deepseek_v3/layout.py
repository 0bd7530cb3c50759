"""Where everything of a converted model goes in a stock DeepSeek-V3 checkpoint: widths, rotary slots, fields of config.json.

Letters: H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.export.engines import Engine, HeadWidths
from xeco_convert.families import AttentionGeometry, FamilySpec
from xeco_convert.families.spec import rope_parameters
from xeco_convert.layer_entries import mla_layer
from xeco_convert.modeling import MlaLayer


@dataclass(frozen=True, kw_only=True)
class RotarySlots:
    """The frequencies of a stock model are theta^(-2j/P). `stride`: slot j holds the source's frequency stride·j."""

    stride: int
    slots: int
    rope_theta: float
    whole: bool

    def slot(self, frequency: int) -> int:
        """The slot of a source frequency."""
        return frequency // self.stride


@dataclass(frozen=True, kw_only=True)
class ExportLayout:
    """What export needs to know before it reads a weight. `config`: fields as transformers resolved them; `norm_eps`: of the
    latent norm in the engine's forward; `fused_mlp`: gate and up projections are one tensor; `head_is_embedding`: no output
    head is stored, so that it is the embedding."""

    family: FamilySpec
    geometry: AttentionGeometry
    config: Mapping[str, Any]
    fused_mlp: bool
    head_is_embedding: bool
    layers: tuple[MlaLayer, ...]
    heads: HeadWidths
    rank: int
    rotary: RotarySlots
    engine: Engine
    norm_eps: float

    @property
    def query_scale(self) -> float:
        """The source's softmax scale over the stock one, (N + P)^-½: it goes into the queries."""
        return self.family.softmax_scale(self.config) * math.sqrt(self.heads.nope + self.heads.rope)

    @property
    def widths(self) -> dict[str, int]:
        """Of every layer, by their names in config.json."""
        return {
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": self.heads.nope,
            "qk_rope_head_dim": self.heads.rope,
            "v_head_dim": self.heads.v,
        }

    @property
    def cache_width(self) -> int:
        """Numbers that the exported model caches per token and layer."""
        return self.rank + self.heads.rope

    def frequencies(self, layer: int) -> tuple[int, ...]:
        """The source frequency of each rotary pair of a layer."""
        widths = self.layers[layer]
        return tuple(range(widths.qk_rope_head_dim // 2)) if widths.rope_index is None else widths.rope_index


def make_layout(config: Mapping[str, Any], family: FamilySpec, engine: Engine, stored: Collection[str]) -> ExportLayout:
    """Check a converted configuration, as transformers resolved it, against an engine; `stored`: names of the tensors.

    Raises `UnsupportedModelError` with what would come out wrong.
    """
    layers = _mla_layers(config)
    _check_attention(config, family, layers)
    geometry = family.geometry(config)
    needed = max((layer.qk_rope_head_dim for layer in layers), default=0)
    rotary = _slots(config, family, layers, needed)
    heads = engine.padded_heads(
        HeadWidths(
            nope=max(layer.qk_nope_head_dim for layer in layers),
            rope=2 * rotary.slots,
            v=max(layer.v_head_dim for layer in layers),
        )
    )
    rotary = _widened(rotary, config, family, layers, heads.rope // 2)
    engine.check_rope(config, whole=rotary.whole)
    return ExportLayout(
        family=family,
        geometry=geometry,
        config=config,
        fused_mlp=f"{family.layers.format(layer=0)}mlp.gate_up_proj.weight" in stored,
        head_is_embedding=family.output_head not in stored,
        layers=layers,
        heads=heads,
        rank=engine.padded_rank(max(layer.kv_lora_rank for layer in layers)),
        rotary=rotary,
        engine=engine,
        norm_eps=family.norm_eps(config) if engine.norm_eps is None else engine.norm_eps,
    )


def _mla_layers(config: Mapping[str, Any]) -> tuple[MlaLayer, ...]:
    entries = config.get("mla_layers")
    if not isinstance(entries, list) or not entries:
        raise CheckpointError("config.json: expected a checkpoint converted by xeco-convert, found no mla_layers.")
    kept = [number for number, entry in enumerate(entries) if entry is None]
    if kept:
        raise UnsupportedModelError(
            f"config.json: layers {kept} kept the source's attention, and a DeepSeek model has none but MLA; convert all layers."
        )
    return tuple(mla_layer(number, entry) for number, entry in enumerate(entries))


def _check_attention(config: Mapping[str, Any], family: FamilySpec, layers: Sequence[MlaLayer]) -> None:
    """What stock classes cannot do, each with its reason."""
    biases = sorted({name for layer in layers for name in layer.biases})
    reason = family.not_portable_because(config, biases)
    if reason is not None:
        raise UnsupportedModelError(
            f"config.json: a {family.model_type} model cannot become DeepSeek-V3: {reason}. Serve the converted folder itself "
            "with transformers, or with vLLM where xeco-convert is installed beside it (docs/serving.md); other engines cannot "
            "load it."
        )


def _slots(config: Mapping[str, Any], family: FamilySpec, layers: Sequence[MlaLayer], rope: int) -> RotarySlots:
    """The narrowest stock grid that has a slot for every frequency in use."""
    used: set[int] = set()
    for number, layer in enumerate(layers):
        index = layer.rope_index if layer.rope_index is not None else tuple(range(layer.qk_rope_head_dim // 2))
        repeated = sorted({frequency for frequency in index if index.count(frequency) > 1})
        if repeated:
            raise UnsupportedModelError(
                f"config.json: layer {number} rotates several pairs at one frequency ({repeated[0]}), and a stock rotary key has "
                "one pair for each; convert with --portable."
            )
        used.update(index)
    fresh = any(layer.rope_index is None for layer in layers)
    if fresh and any(layer.rope_index is not None or layer.qk_rope_head_dim != rope for layer in layers):
        raise UnsupportedModelError(
            "config.json: rotary widths or frequencies differ between layers; convert with --portable."
        )
    stride = math.gcd(*used) or 1
    slots = max(used, default=0) // stride + 1
    return _widened(RotarySlots(stride=stride, slots=slots, rope_theta=0.0, whole=False), config, family, layers, slots)


def _widened(
    rotary: RotarySlots, config: Mapping[str, Any], family: FamilySpec, layers: Sequence[MlaLayer], slots: int
) -> RotarySlots:
    """The same grid with more slots: theta'^(-2j/P') has to be theta^(-2·stride·j/D), D the width that theta is over."""
    fresh = next((layer.qk_rope_head_dim for layer in layers if layer.rope_index is None), None)
    width = fresh or family.rotary_width(config)
    theta = float(rope_parameters(config)["rope_theta"])
    stock = theta ** (rotary.stride * 2 * slots / width)
    whole = rotary.stride == 1 and 2 * slots == width
    return RotarySlots(stride=rotary.stride, slots=slots, rope_theta=theta if whole else stock, whole=whole)

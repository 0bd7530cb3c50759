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
from xeco_convert.export.formats.deepseek_v3.rotary import RotarySlots, used_frequencies
from xeco_convert.families import AttentionGeometry, FamilySpec
from xeco_convert.layer_entries import mla_layer
from xeco_convert.modeling import MlaLayer


@dataclass(frozen=True, kw_only=True)
class ExportLayout:
    """What export needs to know before it reads a weight. `config`: fields as transformers resolved them; `norm_eps`: of the
    latent norm in the engine's forward; `fused_mlp`: gate and up projections are one tensor; `head_is_embedding`: no output
    head is stored, so that it is the embedding; `engine_fields`: what the engine wants otherwise in config.json."""

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
    engine_fields: Mapping[str, Any]
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
    engine.check_layers(geometry.num_hidden_layers)
    used = used_frequencies(config, family, layers)
    heads = engine.padded_heads(
        HeadWidths(
            nope=max(layer.qk_nope_head_dim for layer in layers),
            rope=2 * used.needed_slots,
            v=max(layer.v_head_dim for layer in layers),
        )
    )
    rotary = used.in_slots(heads.rope // 2)
    engine.check_rope(used.kind, whole=rotary.whole, unscaled=used.unscaled)
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
        engine_fields=engine.config_fields(rotary.settings),
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
    packed = [number for number, layer in enumerate(layers) if layer.is_packed]
    if packed:
        raise UnsupportedModelError(
            f"config.json: layers {packed} cache latents in codes (--cache-bits), and a stock model caches numbers of its own "
            "dtype; convert without --cache-bits."
        )
    biases = sorted({name for layer in layers for name in layer.biases})
    reason = family.not_portable_because(config, biases)
    if reason is not None:
        raise UnsupportedModelError(
            f"config.json: a {family.model_type} model cannot become DeepSeek-V3: {reason}. Serve the converted folder itself "
            "with transformers, or with vLLM where xeco-convert is installed beside it (docs/serving.md); other engines cannot "
            "load it."
        )

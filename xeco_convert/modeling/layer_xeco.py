"""The widths of a converted layer, and the one table of its tensors: what a plan counts, the writer names, the model builds.

This file is also written beside the weights of converted checkpoints; it needs nothing but Python.

Letters: H query heads, G key/value groups, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_BIASES = ("q", "k", "v", "kv_a", "kv_b", "o")
CACHE_BITS = (16, 8, 6, 5, 4, 3, 2)  # of a cached number; 16 stands for the numbers themselves, in the model's dtype
# Bits of each number, or how many numbers each bit plane reaches (ops/packed_rows.py): several numbers of bits in a row.
Bits = int | tuple[int, ...]
_BITS = ("latent_bits", "rope_bits")
_MOST_PLANES = 7
_SCALE_BYTES = 2  # the scale of a row in fewer bits than 16


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _list_of(value: Any, allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(allowed(item) for item in value)


def _are_bits(value: Any) -> bool:
    """A number of bits, or widths of bit planes that a row can have."""
    if not isinstance(value, list | tuple):
        return type(value) is int and value in CACHE_BITS
    whole = all(_whole(reached, 8) and reached % 8 == 0 for reached in value)
    return whole and 2 <= len(value) <= _MOST_PLANES and list(value) == sorted(value, reverse=True)


# What each field of an entry may be, before it is computed with.
_ENTRY_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "kv_lora_rank": lambda value: _whole(value, 1),
    "qk_nope_head_dim": lambda value: _whole(value, 0),
    "qk_rope_head_dim": lambda value: _whole(value, 0) and value % 2 == 0,
    "v_head_dim": lambda value: _whole(value, 1),
    "q_lora_rank": lambda value: value is None or _whole(value, 1),
    "latent_norm": lambda value: isinstance(value, bool),
    "rope_index": lambda value: value is None or _list_of(value, lambda item: _whole(item, 0)),
    "biases": lambda value: _list_of(value, lambda item: item in _BIASES),
    "q_norm": lambda value: value in (None, "head", "all"),
    "k_norm": lambda value: value in (None, "head", "all"),
    "logit_softcap": lambda value: value is None or (type(value) in (int, float) and 0 < value < math.inf),
    "latent_bits": _are_bits,
    "rope_bits": _are_bits,
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def row_bytes(width: int, bits: Bits, number_bytes: int) -> int:
    """Bytes of a cached row of `width` numbers: at 16 bits numbers of `number_bytes`, else codes and their scale."""
    if width == 0 or bits == 16:
        return width * number_bytes
    return (sum(bits) if isinstance(bits, tuple) else width * bits) // 8 + _SCALE_BYTES


def row_multiple(bits: Bits) -> int:
    """What the width of a row in so many bits is a multiple of: bit planes are whole bytes, 4 bits half a byte."""
    return {16: 1, 8: 1, 4: 2}.get(bits, 8) if isinstance(bits, int) else 8


def average_bits(bits: Bits) -> int | float:
    """Bits of a number of the row."""
    average = bits if isinstance(bits, int) else sum(bits) / bits[0]
    return int(average) if average == int(average) else average


@dataclass(frozen=True, kw_only=True)
class MlaLayer:
    """Widths of one converted layer in DeepSeek's names, as config.json holds them.

    `rope_index` says which frequency of the source each rotary pair uses (qk_rope_head_dim / 2 entries); None stands for
    fresh frequencies of the source's rotary type over qk_rope_head_dim, as X-EcoMLA takes them. A layer without rotation has
    qk_rope_head_dim 0. `biases` names the projections that have one. `q_norm` is "head" or "all" where queries are normalised
    behind q_proj (each head by itself, or all rows together); q_head_proj then maps each head to its un-rotated and rotary
    rows, and qk_nope_head_dim is the source's head_dim. `k_norm` is the same of the keys: the source's k_proj, k_norm and
    v_proj stay (`biases` may name k and v), and kv_a_proj_with_mqa reads normalised keys and values of all groups in place of
    the layer's input; the source's head_dim is v_head_dim then. `logit_softcap` bounds the scores: cap · tanh(score / cap).
    `latent_bits` and `rope_bits`: how latent and rotary key are cached, 16 for the numbers themselves, 8, 6, 5, 4, 3 or 2 for
    codes with a scale for each token, widths of bit planes where the first numbers have more bits than the last.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_norm: bool = False
    rope_index: tuple[int, ...] | None = None
    biases: tuple[str, ...] = ()
    q_norm: str | None = None
    k_norm: str | None = None
    logit_softcap: float | None = None
    latent_bits: Bits = 16
    rope_bits: Bits = 16

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MlaLayer:
        """Read an entry of config.json. Raises `ValueError` naming unknown keys and widths that cannot be."""
        if not isinstance(data, Mapping):
            raise ValueError(f"mla_layers: expected an object or null for each layer, found {_shown(data)}")
        unknown = sorted(set(data) - {item.name for item in fields(MlaLayer)})
        if unknown:
            raise ValueError(f"mla_layers: unknown keys {_shown(unknown)}; this checkpoint needs a newer xeco-convert")
        for name, allowed in _ENTRY_CHECKS.items():
            if (name in data or name in _WIDTHS) and not allowed(data.get(name)):
                rule = (
                    "widths must be positive and qk_rope_head_dim even" if name in _WIDTHS else "no such value can be"
                )
                raise ValueError(f"mla_layers: {rule}, found {name} = {_shown(data.get(name))}")
        # JSON's lists
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        layer = MlaLayer(**values)
        obstacle = layer.bits_obstacle
        if obstacle is not None:
            raise ValueError(f"mla_layers: {obstacle}")
        if layer.rope_index is not None and len(layer.rope_index) != layer.qk_rope_head_dim // 2:
            raise ValueError(
                f"mla_layers: expected {layer.qk_rope_head_dim // 2} rope_index entries, found {len(layer.rope_index)}"
            )
        return layer

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json: plain JSON types."""
        entry = {name: list(value) if isinstance(value, tuple) else value for name, value in self._widths().items()}
        # older releases know no bits: they read what they can, and refuse the rest
        return {name: value for name, value in entry.items() if name not in _BITS or value != 16}

    def in_model(self, config: Any) -> MlaShape:
        """The layer in a model of this configuration (of the source, or of the converted model)."""
        return MlaShape(
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=0 if self.k_norm is None else config.num_key_value_heads,
            hidden_size=config.hidden_size,
            **self._widths(),
        )

    def _widths(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(MlaLayer)}

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: its un-rotated rows, then its rotary rows."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token: the latent and the one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def is_packed(self) -> bool:
        """Whether latent or rotary key are cached in codes."""
        return self.latent_bits != 16 or self.rope_bits != 16

    @property
    def bits_in_words(self) -> str:
        """Average bits of the latent's numbers and of the rotary key's, such as 4 + 8."""
        return f"{average_bits(self.latent_bits):g} + {average_bits(self.rope_bits):g}"

    @property
    def bits_obstacle(self) -> str | None:
        """Why rows of these widths cannot be cached in these bits, in words."""
        rows = (
            ("kv_lora_rank", self.kv_lora_rank, self.latent_bits),
            ("qk_rope_head_dim", self.qk_rope_head_dim, self.rope_bits),
        )
        for name, width, bits in rows:
            multiple = row_multiple(bits)
            if width % multiple:
                return f"a row in {average_bits(bits):g} bits takes a multiple of {multiple} numbers, found {name} = {width}"
            if isinstance(bits, tuple) and bits[0] != width:
                return f"the first bit plane of a row reaches all its numbers, found {bits[0]} of {name} = {width}"
        return None

    def cache_bytes(self, number_bytes: int) -> int:
        """Bytes cached per token, scales included; `number_bytes` is the size of a number of the model."""
        latent = row_bytes(self.kv_lora_rank, self.latent_bits, number_bytes)
        return latent + row_bytes(self.qk_rope_head_dim, self.rope_bits, number_bytes)


@dataclass(frozen=True, kw_only=True)
class MlaShape(MlaLayer):
    """A layer with the numbers of its model: all that the sizes of its tensors follow from. `num_key_value_heads` is 0 where
    the source's keys do not stay."""

    num_attention_heads: int
    hidden_size: int
    num_key_value_heads: int = 0

    @property
    def key_value_width(self) -> int:
        """Rows of the source's k_proj, and of its v_proj, where they stay: G·V."""
        return self.num_key_value_heads * self.v_head_dim

    @property
    def query_rows(self) -> int:
        """Rows of the projection of the queries: H·(N+P), or the source's own H·N before its norm."""
        return self.num_attention_heads * (self.qk_head_dim if self.q_norm is None else self.qk_nope_head_dim)

    @property
    def latent_inputs(self) -> int:
        """Width of what kv_a_proj_with_mqa reads: the layer's input, or normalised keys and values of all groups."""
        return self.hidden_size if self.k_norm is None else 2 * self.key_value_width

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names below the attention module with sizes, in the order of the table."""
        return {tensor.name: tensor.size(self) for tensor in LAYER_TENSORS if tensor.is_part_of(self)}


@dataclass(frozen=True)
class LayerTensor:
    """One row of the table: the name below the attention module, the field of `factorize.MlaAttention`, the size, and which
    layers have it."""

    name: str
    field: str
    size: Callable[[MlaShape], tuple[int, ...]]
    is_part_of: Callable[[MlaShape], bool] = lambda shape: True


# fmt: off
LAYER_TENSORS = (
    # a norm of the queries, and what maps each normalised head to its un-rotated and rotary rows
    LayerTensor("q_norm.weight", "q_norm_weight",
                lambda s: (s.qk_nope_head_dim * (s.num_attention_heads if s.q_norm == "all" else 1),),
                lambda s: s.q_norm is not None),
    LayerTensor("q_head_proj.weight", "q_head_weight",
                lambda s: (s.num_attention_heads * s.qk_head_dim, s.qk_nope_head_dim), lambda s: s.q_norm is not None),
    # queries, whole or in two factors
    LayerTensor("q_proj.weight", "q_weight", lambda s: (s.query_rows, s.hidden_size), lambda s: s.q_lora_rank is None),
    LayerTensor("q_proj.bias", "q_bias", lambda s: (s.query_rows,), lambda s: s.q_lora_rank is None and "q" in s.biases),
    LayerTensor("q_a_proj.weight", "q_a_weight",
                lambda s: (s.q_lora_rank or 0, s.hidden_size), lambda s: s.q_lora_rank is not None),
    LayerTensor("q_b_proj.weight", "q_b_weight",
                lambda s: (s.query_rows, s.q_lora_rank or 0), lambda s: s.q_lora_rank is not None),
    LayerTensor("q_b_proj.bias", "q_bias",
                lambda s: (s.query_rows,), lambda s: s.q_lora_rank is not None and "q" in s.biases),
    # the source's own keys and values, where its keys are normalised
    LayerTensor("k_proj.weight", "k_weight", lambda s: (s.key_value_width, s.hidden_size), lambda s: s.k_norm is not None),
    LayerTensor("k_proj.bias", "k_bias", lambda s: (s.key_value_width,), lambda s: "k" in s.biases),
    LayerTensor("v_proj.weight", "v_weight", lambda s: (s.key_value_width, s.hidden_size), lambda s: s.k_norm is not None),
    LayerTensor("v_proj.bias", "v_bias", lambda s: (s.key_value_width,), lambda s: "v" in s.biases),
    LayerTensor("k_norm.weight", "k_norm_weight",
                lambda s: (s.key_value_width if s.k_norm == "all" else s.v_head_dim,), lambda s: s.k_norm is not None),
    # latent and shared rotary key, and each head's keys and values from the latent
    LayerTensor("kv_a_proj_with_mqa.weight", "kv_a_weight", lambda s: (s.cache_width, s.latent_inputs)),
    LayerTensor("kv_a_proj_with_mqa.bias", "kv_a_bias", lambda s: (s.cache_width,), lambda s: "kv_a" in s.biases),
    LayerTensor("kv_a_layernorm.weight", "latent_norm_weight", lambda s: (s.kv_lora_rank,), lambda s: s.latent_norm),
    LayerTensor("kv_b_proj.weight", "kv_b_weight",
                lambda s: (s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)),
    LayerTensor("kv_b_proj.bias", "kv_b_bias",
                lambda s: (s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim),), lambda s: "kv_b" in s.biases),
    LayerTensor("o_proj.weight", "o_weight", lambda s: (s.hidden_size, s.num_attention_heads * s.v_head_dim)),
    LayerTensor("o_proj.bias", "o_bias", lambda s: (s.hidden_size,), lambda s: "o" in s.biases),
)
# fmt: on
FIELDS = {tensor.name: tensor.field for tensor in LAYER_TENSORS}

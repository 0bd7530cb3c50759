"""What a family file may say, checked when it is read: unknown keys raise, so that a misspelt one is not ignored.

`values` is a configuration as transformers resolved it (its object's `to_dict`): defaults filled in, old spellings read.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError, shown

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = "qkv_proj"
QKV_LAYOUTS = ("stacked", "per_head")
_NORMS = ("q_norm", "k_norm")
_LONGEST_METHOD = 40


@dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """The numbers of a source's attention: what a layer's factorisation and its cache are computed from."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def cache_width(self) -> int:
        """Numbers that the source caches per token and layer: keys and values of all groups."""
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """How one layer of a source attends: rows of a head that are rotated (0: none, a NoPE layer), and the tokens that a query
    sees, itself included (None: all). `keeps_window`: its cache does not grow beyond that, so it keeps its attention."""

    rotary_dim: int
    window: int | None
    keeps_window: bool


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family: where its attention is, which transformers classes run it, what they do beside the attention.

    `attention` names the projections (q_proj, k_proj and v_proj, or one qkv_proj whose rows are "stacked" or "per_head", by
    `qkv_layout`), and the norms q_norm and k_norm where there are any, with `{layer}` for the number of the layer. Fields of
    the configuration are named where a family has them: `embedding_scale` (or "sqrt(hidden_size)"), `logits_divisor`,
    `logits_softcap`, `attention_softcap`, `attention_scale` (in place of head_dim^-½), `residual_scale`, `nope_layers` (a list
    of 0 and 1, 0 for a layer without rotation). `partial_rotary`: whether a part of each head may be rotated. `norm_offset` is
    added to the stored weight of every norm. `not_portable`: why it cannot become a stock DeepSeek model, if so. Other
    fields: docs/adding_a_family.md.
    """

    model_type: str
    title: str
    class_prefix: str
    rope_types: tuple[str, ...]
    attention: Mapping[str, str]
    input_norm: str = ""
    kept: str = ""
    layers: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm."
    output_head: str = "lm_head.weight"
    qkv_layout: str = ""
    norm_offset: float = 0.0
    post_attention_norm: bool = False
    embedding_scale: str = ""
    logits_divisor: str = ""
    logits_softcap: str = ""
    attention_softcap: str = ""
    nope_layers: str = ""
    partial_rotary: bool = False
    rope_of_layer_type: bool = False
    keeps_windows: bool = False
    attention_scale: str = ""
    residual_scale: str = ""
    not_portable: str = ""

    @classmethod
    def from_toml(cls, path: Path) -> FamilySpec:
        """Read a family file. Raises `ValueError` that names unknown or missing keys: a fault of the file, not the user."""
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        known = {item.name for item in fields(cls)}
        required = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
        if set(data) - known or required - set(data):
            raise ValueError(
                f"{path.name}: unknown keys {sorted(set(data) - known)}, missing {sorted(required - set(data))}"
            )
        named = set(data["attention"]) - set(_NORMS)
        if named not in (set(PROJECTIONS), {FUSED, "o_proj"}):
            raise ValueError(f"{path.name}: [attention] must name {', '.join(PROJECTIONS)}, or {FUSED} and o_proj")
        if (FUSED in named) is not (data.get("qkv_layout", "") in QKV_LAYOUTS):
            raise ValueError(
                f"{path.name}: qkv_layout must be one of {', '.join(QKV_LAYOUTS)} with {FUSED}, and only then"
            )
        return cls(**{**data, "rope_types": tuple(data["rope_types"])})

    def within(self, decoder: str, output_head: str) -> FamilySpec:
        """The family as a part of a larger model, in which its decoder and the output head have these names: the names of its
        tensors there. Such models do nothing to the logits after the head, whatever the text model alone would do."""
        base = self.layers.partition("layers.")[0]

        def moved(name: str) -> str:
            return f"{decoder}.{name.removeprefix(base)}" if name else ""

        return replace(
            self,
            attention={which: moved(name) for which, name in self.attention.items()},
            input_norm=moved(self.input_norm),
            layers=moved(self.layers),
            embedding=moved(self.embedding),
            final_norm=moved(self.final_norm),
            output_head=f"{output_head}.weight",
            logits_divisor="",
            logits_softcap="",
            not_portable="it is part of a model of text and images, for which there is no stock class",
        )

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that are converted, as the source stores them."""
        return tuple(name for name in (*PROJECTIONS, FUSED) if name in self.attention)

    @property
    def has_key_norm(self) -> bool:
        """Whether keys are normalised after their projection, so that they are not linear in the layer's input."""
        return "k_norm" in self.attention

    @property
    def module(self) -> str:
        """Name of the attention module within a decoder layer."""
        return self.attention["o_proj"].removeprefix(self.layers).rpartition(".")[0]

    def module_name(self, layer: int) -> str:
        """Full name of a layer's attention module."""
        return f"{self.layers.format(layer=layer)}{self.module}"

    def geometry(self, values: Mapping[str, Any]) -> AttentionGeometry:
        """Numbers of the attention. Raises `CheckpointError` for fields that are missing or do not fit each other."""
        numbers = {name: _integer(values, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        heads = numbers["num_attention_heads"]
        for name, otherwise in (("num_key_value_heads", heads), ("head_dim", numbers["hidden_size"] // heads)):
            numbers[name] = otherwise if values.get(name) is None else _integer(values, name)
        if heads % numbers["num_key_value_heads"]:
            raise CheckpointError(
                f"config.json: num_attention_heads must be a multiple of num_key_value_heads, found {heads} and "
                f"{numbers['num_key_value_heads']}; take config.json from the model's own folder."
            )
        if numbers["head_dim"] % 2 or not numbers["head_dim"]:
            raise CheckpointError(f"config.json: rotary attention needs an even head_dim, found {numbers['head_dim']}.")
        return AttentionGeometry(**numbers)

    def check_config(self, values: Mapping[str, Any]) -> None:
        """Refuse rotary types that this family is not known to convert, shares of a head that cannot be, and attention that is
        not causal. Raises `UnsupportedModelError`, `CheckpointError`.
        """
        if values.get("use_bidirectional_attention"):
            raise UnsupportedModelError(
                "config.json: use_bidirectional_attention is set: an encoder of text, whose tokens see what follows them; "
                "expected a decoder, whose KV cache grows with the text."
            )
        for rope in self._all_rope_parameters(values):
            rope_type = rope.get("rope_type", "default")
            if rope_type not in self.rope_types:
                raise UnsupportedModelError(
                    f"config.json: rotary type {shown(rope_type)} is not supported for {self.model_type}; "
                    f"supported are {', '.join(self.rope_types)}."
                )
            share = rope.get("partial_rotary_factor")
            if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
                raise CheckpointError(
                    f"config.json: expected partial_rotary_factor above 0 and at most 1, found {shown(share)}; "
                    "take config.json from the model's own folder."
                )

    def check_numbers(self, values: Mapping[str, Any]) -> None:
        """Refuse numbers that the model could only compute nonsense with. Raises `CheckpointError`."""
        positive = (self.attention_scale, self.attention_softcap, self.logits_softcap, self.logits_divisor)
        least = {**dict.fromkeys((*positive, self.embedding_scale), 0.0), self.residual_scale: -math.inf}
        for name, bound in {**least, "rms_norm_eps": -math.inf, "layer_norm_eps": -math.inf}.items():
            value = values.get(name)
            if value is not None and not (type(value) in (int, float) and bound < value < math.inf):
                kind = "positive" if bound == 0 else "finite"
                raise CheckpointError(
                    f"config.json: expected a {kind} number for {name}, found {shown(value)}; take config.json from the model's "
                    "own folder."
                )

    def norm_eps(self, values: Mapping[str, Any]) -> float:
        """The eps of the norms."""
        return float(values.get("rms_norm_eps") or values.get("layer_norm_eps") or 0.0)

    def not_portable_because(self, values: Mapping[str, Any], biases: Sequence[str]) -> str | None:
        """Why a model of this configuration cannot become stock DeepSeek-V3; `biases`: projections that have one."""
        if self.not_portable:
            return self.not_portable
        if biases:
            return f"its attention has biases ({', '.join(biases)}), which the engines drop or reject"
        if values.get("mlp_bias"):
            return "its MLP has biases, for which the stock class has no place"
        if self.window_in_use(values):
            return f"it attends through a window of {values.get('sliding_window')} tokens, which the stock class does not do"
        if values.get("hidden_act", "silu") != "silu":
            return f"its activation is {values['hidden_act']}, and the engines take SiLU for granted"
        return None

    def softmax_scale(self, values: Mapping[str, Any]) -> float:
        """What scores are multiplied by."""
        stated = values.get(self.attention_scale)
        return float(self.geometry(values).head_dim ** -0.5 if stated is None else stated)

    def rotary_width(self, values: Mapping[str, Any]) -> int:
        """Rows of a head that rotated layers rotate: the width that rope_theta is over."""
        share = rope_parameters(values).get("partial_rotary_factor", 1.0)
        return int(self.geometry(values).head_dim * (1.0 if share is None else float(share)))

    def portable_rotary_dim(self, values: Mapping[str, Any]) -> int:
        """The widest rotary key at one pair for each frequency that every engine rotates as the source does: where the rotary
        type leaves the fastest frequencies as they are, only those."""
        width = self.rotary_width(values)
        return 2 * unscaled_frequencies(rope_parameters(values), width) or width

    def logits_scale(self, values: Mapping[str, Any]) -> float:
        """What the output head's products are divided by."""
        return float(values.get(self.logits_divisor) or 1.0)

    def logits_cap(self, values: Mapping[str, Any]) -> float | None:
        """The bound of the logits, if they have one."""
        value = values.get(self.logits_softcap)
        return None if value is None else float(value)

    def window_in_use(self, values: Mapping[str, Any]) -> bool:
        """Whether some layer attends through a sliding window."""
        if values.get("sliding_window") is None or not values.get("use_sliding_window", True):
            return False
        types = values.get("layer_types")
        return not isinstance(types, list) or "sliding_attention" in types

    def _all_rope_parameters(self, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Rotary settings, one for each type of layer that has its own."""
        rope = rope_parameters(values)
        if not self.rope_of_layer_type or not any(isinstance(value, Mapping) for value in rope.values()):
            return [rope]
        return [value for value in rope.values() if isinstance(value, Mapping)]

    def layer_kind(self, values: Mapping[str, Any], layer: int, rotary_dim: int) -> LayerKind:
        """How a layer attends; `rotary_dim`: rows of a head that rotating layers rotate.

        Raises `CheckpointError` where a list in the configuration is too short for it.
        """
        if self.nope_layers and not _entry(values.get(self.nope_layers), layer, self.nope_layers):
            rotary_dim = 0
        window = self.window(values, layer)
        return LayerKind(rotary_dim=rotary_dim, window=window, keeps_window=self.keeps_windows and window is not None)

    def window(self, values: Mapping[str, Any], layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None where it sees all."""
        size, types = values.get("sliding_window"), values.get("layer_types")
        if not isinstance(size, int):
            return None
        if types is None and not self.keeps_windows:
            return size
        return size if _entry(types, layer, "layer_types") == "sliding_attention" else None


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` for weights that are not plain floating-point numbers."""
    if not config.get("quantization_config"):
        return
    settings = config["quantization_config"]
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    named = method if isinstance(method, str) and method.isprintable() else "unnamed"
    raise UnsupportedModelError(
        f"config.json: the weights are quantised ({named[:_LONGEST_METHOD]}), expected float32, bfloat16 or float16; "
        "save a dequantised copy first (model.dequantize() in transformers) and convert that."
    )


def _entry(values: Any, layer: int, name: str) -> Any:
    if not isinstance(values, list) or layer >= len(values):
        raise CheckpointError(
            f"config.json: expected a list with an entry for layer {layer} in {name}, found {shown(values)}."
        )
    return values[layer]


def rope_parameters(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings, as transformers resolved them; of two settings in a config.json, the one that it takes."""
    settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"config.json: rope_parameters must be an object, found {type(settings).__name__}.")
    return settings


def unscaled_frequencies(settings: Mapping[str, Any], width: int) -> int:
    """How many of the fastest frequencies of `width` rotary rows are those of rotary type "default". The type llama3 scales
    only those whose turn takes more than original_max_position_embeddings / high_freq_factor tokens; others may scale all."""
    kind = settings.get("rope_type", "default")
    if kind == "default":
        return width // 2
    if kind != "llama3":
        return 0
    longest_turn = float(settings["original_max_position_embeddings"]) / float(settings["high_freq_factor"])
    theta = float(settings["rope_theta"])
    return sum(2 * math.pi * theta ** (2 * pair / width) <= longest_turn for pair in range(width // 2))


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json: expected a positive whole number for {name}, found {shown(value)}; "
            "take config.json from the model's own folder."
        )
    return value

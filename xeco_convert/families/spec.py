"""What a family file may say, checked when it is read: unknown keys raise, so that a misspelt one is not ignored."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_TENSOR = re.compile(r"^(?P<shape>.*?)(?:\s+(?P<word>if|unless)\s+(?P<field>\w+))?$")


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
class FamilySpec:
    """One family: where its tensors are, what shapes they have, which transformers classes run it.

    `tensors` maps a name (with `{layer}`) to its shape, written in fields of config.json; `attention` names the four
    projections; `ignored` are tensors that old files carry and the model does not read.
    """

    model_type: str
    title: str
    class_prefix: str
    input_norm: str
    rope_types: tuple[str, ...]
    ignored: tuple[str, ...]
    defaults: Mapping[str, Any]
    attention: Mapping[str, str]
    tensors: Mapping[str, str]

    @classmethod
    def from_toml(cls, path: Path) -> FamilySpec:
        """Read a family file. Raises `ValueError` that names unknown or missing keys: a fault of the file, not the user."""
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        known = {item.name for item in fields(cls)}
        if set(data) != known:
            raise ValueError(
                f"{path.name}: unknown keys {sorted(set(data) - known)}, missing {sorted(known - set(data))}"
            )
        if set(data["attention"]) != set(PROJECTIONS):
            raise ValueError(f"{path.name}: [attention] must name {', '.join(PROJECTIONS)}")
        return cls(**{**data, "rope_types": tuple(data["rope_types"]), "ignored": tuple(data["ignored"])})

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The source's config.json with the family's defaults where it is silent (or null)."""
        values = dict(config)
        for name, default in self.defaults.items():
            if values.get(name) is None:
                values[name] = _evaluate(default, values) if isinstance(default, str) else default
        return values

    def geometry(self, config: Mapping[str, Any]) -> AttentionGeometry:
        """Numbers of the attention. Raises `CheckpointError` for fields that are missing or do not fit each other."""
        values = self.completed(config)
        numbers = {item.name: _integer(values, item.name) for item in fields(AttentionGeometry)}
        heads, groups = numbers["num_attention_heads"], numbers["num_key_value_heads"]
        if heads % groups:
            raise CheckpointError(
                f"config.json: num_attention_heads must be a multiple of num_key_value_heads, found {heads} and {groups}; "
                "take config.json from the model's own folder."
            )
        if numbers["head_dim"] % 2:
            raise CheckpointError(f"config.json: rotary attention needs an even head_dim, found {numbers['head_dim']}.")
        return AttentionGeometry(**numbers)

    def expected_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this configuration must hold, with its shape."""
        values = self.completed(config)
        expected: dict[str, tuple[int, ...]] = {}
        for name, rule in self.tensors.items():
            match = _TENSOR.match(rule)
            assert match is not None
            if match["word"] and bool(values.get(match["field"])) is (match["word"] == "unless"):
                continue
            shape = tuple(_evaluate(part, values) for part in match["shape"].split(","))
            for layer in range(_integer(values, "num_hidden_layers")) if "{layer}" in name else (0,):
                expected[name.format(layer=layer)] = shape
        return expected

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is one that old files carry although the model computes it."""
        return any(re.fullmatch(re.escape(rule).replace(r"\{layer\}", r"\d+"), name) for rule in self.ignored)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse settings whose attention this family does not describe. Raises `UnsupportedModelError`."""
        if config.get("quantization_config"):
            settings = config["quantization_config"]
            method = settings.get("quant_method", "unnamed") if isinstance(settings, Mapping) else "unnamed"
            raise UnsupportedModelError(
                f"config.json: the weights are quantised ({method}), expected float32, bfloat16 or float16; "
                "save a dequantised copy first (model.dequantize() in transformers) and convert that."
            )
        rope = rope_parameters(config)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in self.rope_types:
            raise UnsupportedModelError(
                f"config.json: rotary type {rope_type!r} is not supported for {self.model_type}; "
                f"supported are {', '.join(self.rope_types)}."
            )
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"config.json: partial_rotary_factor {partial} is not supported for {self.model_type}, expected 1."
            )


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of config.json, under their present name or the one before transformers 5."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: rope_parameters must be an object, found {type(found).__name__}.")
    return found


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json: expected a positive whole number for {name}, found {value!r}; "
            "take config.json from the model's own folder."
        )
    return value


def _evaluate(expression: str, values: Mapping[str, Any]) -> int:
    """Value of `a`, `a * b` or `a / b`, each a field of config.json."""
    words = expression.split()
    result = _integer(values, words[0])
    for sign, word in zip(words[1::2], words[2::2], strict=True):
        operand = _integer(values, word)
        if sign == "*":
            result *= operand
        elif sign == "/" and result % operand == 0:
            result //= operand
        else:
            raise CheckpointError(
                f"config.json: expected a whole number for {expression}, found {result} {sign} {operand}."
            )
    return result

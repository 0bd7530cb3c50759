"""What a family file may say, checked when it is read: unknown keys raise, so that a misspelt one is not ignored."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = "qkv_proj"
QKV_LAYOUTS = ("stacked", "per_head")
_NORMS = ("q_norm", "k_norm")
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
class LayerKind:
    """How one layer of a source attends: rows of a head that are rotated (0: none, a NoPE layer), and its sliding window."""

    rotary_dim: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family: where its tensors are, what shapes they have, which transformers classes run it, how it attends.

    `tensors` maps a name (with `{layer}` and, in mixtures of experts, `{expert}`) to its shape, written in fields of
    config.json; `sparse_tensors` are those of layers with experts, `dense_tensors` those of the other layers;
    `attention` names the projections (q_proj, k_proj and v_proj, or one qkv_proj whose rows are "stacked" or "per_head", by
    `qkv_layout`), and the norms q_norm and k_norm where there are any. `ignored` are tensors that old files carry and the
    model does not read. Fields of config.json are named where a family has them: `embedding_scale` (or
    "sqrt(hidden_size)"), `logits_divisor`, `logits_softcap`, `attention_softcap`, `attention_scale` (in place of
    head_dim^-½), `residual_scale`, `nope_layers` (a list of 0 and 1, 0 for a layer without rotation), `num_experts`.
    `norm_offset` is added to the stored weight of every norm. `not_portable`: why it cannot become a stock DeepSeek
    model, if so. `aliases`: fields and the other name that config.json may have for them. Other fields: docs/adding_a_family.md.
    """

    model_type: str
    title: str
    class_prefix: str
    rope_types: tuple[str, ...]
    defaults: Mapping[str, Any]
    attention: Mapping[str, str]
    tensors: Mapping[str, str]
    input_norm: str = ""
    ignored: tuple[str, ...] = ()
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
    partial_rotary: str = ""
    rope_of_layer_type: bool = False
    keeps_windows: bool = False
    num_experts: str = ""
    sparse_tensors: Mapping[str, str] = field(default_factory=dict)
    dense_tensors: Mapping[str, str] = field(default_factory=dict)
    understood: tuple[str, ...] = ()
    attention_scale: str = ""
    residual_scale: str = ""
    not_portable: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

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
        lists: dict[str, Any] = {
            name: tuple(data[name]) for name in ("rope_types", "ignored", "understood") if name in data
        }
        return cls(**{**data, **lists})

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

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The source's config.json with the family's defaults where it is silent (or null)."""
        values = dict(config)
        for name, other in self.aliases.items():
            if values.get(name) is None and values.get(other) is not None:
                values[name] = values[other]
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
        layers = range(_integer(values, "num_hidden_layers"))
        sparse = [layer for layer in layers if self._is_sparse(values, layer)]
        dense = [layer for layer in layers if layer not in set(sparse)]
        expected: dict[str, tuple[int, ...]] = {}
        for rules, chosen in (
            (self.tensors, layers),
            (self.sparse_tensors, sparse),
            (self.dense_tensors, dense),
        ):
            for name, rule in rules.items():
                shape = _shape(rule, values)
                if shape is not None:
                    expected.update(dict.fromkeys(self._names(name, values, chosen), shape))
        return expected

    def _names(self, name: str, values: Mapping[str, Any], layers: Iterable[int]) -> Iterator[str]:
        """The tensors that a name with {layer} and {expert} stands for."""
        if "{layer}" not in name:
            yield name
            return
        experts = range(_integer(values, self.num_experts)) if "{expert}" in name else range(1)
        for layer in layers:
            for expert in experts:
                yield name.format(layer=layer, expert=expert)

    def expert_parts(self, name: str, config: Mapping[str, Any]) -> list[list[str]]:
        """The stored tensors, one list for each expert, that make up a tensor which the transformers class holds for all
        experts (gate and up projections of an expert are one tensor there); the stored router for the class's own."""
        layer = re.sub(r".*\blayers\.(\d+)\..*", r"\1", name)
        if name.endswith(".gate.weight"):
            return [[next(rule.format(layer=layer) for rule in self.sparse_tensors if rule.endswith(".gate.weight"))]]
        rules = [rule for rule in self.sparse_tensors if "{expert}" in rule]
        chosen = rules[:2] if name.endswith("gate_up_proj") else rules[2:]
        count = _integer(self.completed(config), self.num_experts)
        return [[rule.format(layer=layer, expert=expert) for rule in chosen] for expert in range(count)]

    def _is_sparse(self, values: Mapping[str, Any], layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        if not self.num_experts or not _integer(values, self.num_experts):
            return False
        if layer in (values.get("mlp_only_layers") or ()):
            return False
        step = values.get("decoder_sparse_step") or 1
        return (layer + 1) % int(step) == 0

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is one that old files carry although the model computes it."""
        return any(re.fullmatch(re.escape(rule).replace(r"\{layer\}", r"\d+"), name) for rule in self.ignored)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse settings whose attention this family does not describe. Raises `UnsupportedModelError`."""
        refuse_quantised(config)
        for rope in self._all_rope_parameters(config):
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if rope_type not in self.rope_types:
                raise UnsupportedModelError(
                    f"config.json: rotary type {rope_type!r} is not supported for {self.model_type}; "
                    f"supported are {', '.join(self.rope_types)}."
                )
        factor = self._partial_rotary_factor(config)
        if factor != 1 and not self.partial_rotary:
            raise UnsupportedModelError(
                f"config.json: partial_rotary_factor {factor} is not supported for {self.model_type}, expected 1."
            )
        self._check_unknown_fields(config)

    def norm_eps(self, config: Mapping[str, Any]) -> float:
        """The eps of the norms, as transformers defaults it."""
        return float(
            config.get("rms_norm_eps") or config.get("layer_norm_eps") or self.defaults.get("rms_norm_eps", 1e-6)
        )

    def not_portable_because(self, config: Mapping[str, Any], biases: Sequence[str]) -> str | None:
        """Why a model of this configuration cannot become stock DeepSeek-V3; `biases`: projections that have one."""
        if self.not_portable:
            return self.not_portable
        if biases:
            return f"its attention has biases ({', '.join(biases)}), which the engines drop or reject"
        if self.completed(config).get("mlp_bias"):
            return "its MLP has biases, for which the stock class has no place"
        if self.window_in_use(config):
            return f"it attends through a window of {config.get('sliding_window')} tokens, which the stock class does not do"
        if config.get("hidden_act", "silu") != "silu":
            return f"its activation is {config['hidden_act']}, and the engines take SiLU for granted"
        return None

    def softmax_scale(self, config: Mapping[str, Any]) -> float:
        """What scores are multiplied by."""
        stated = self.completed(config).get(self.attention_scale)
        return float(self.geometry(config).head_dim ** -0.5 if stated is None else stated)

    def rotary_width(self, config: Mapping[str, Any]) -> int:
        """Rows of a head that rotated layers rotate: the width that rope_theta is over."""
        return int(self.geometry(config).head_dim * self._partial_rotary_factor(config))

    def window_in_use(self, config: Mapping[str, Any]) -> bool:
        """Whether some layer attends through a sliding window."""
        if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
            return False
        types = config.get("layer_types")
        return not isinstance(types, list) or "sliding_attention" in types

    def _check_unknown_fields(self, config: Mapping[str, Any]) -> None:
        """A field that looks like attention, that is set, and that this family does not know: converting would be a guess."""
        known = {*_COMMON_FIELDS, *self.understood, *self.defaults}
        for name, value in config.items():
            if _ATTENTION_WORDS.search(name) and name not in known and value not in (None, False, [], {}, ""):
                raise UnsupportedModelError(
                    f"config.json: {name} = {value!r} is no field of a {self.model_type} model, and its name says that it "
                    f"changes the attention; this may be another architecture under the name {self.model_type}. Remove the "
                    "field if the model does not use it."
                )

    def _all_rope_parameters(self, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Rotary settings, one for each type of layer that has its own."""
        rope = rope_parameters(config)
        if not self.rope_of_layer_type or not any(isinstance(value, Mapping) for value in rope.values()):
            return [rope]
        return [value for value in rope.values() if isinstance(value, Mapping)]

    def _partial_rotary_factor(self, config: Mapping[str, Any]) -> float:
        """Share of a head's rows that are rotated; 1 where nothing is said."""
        values = self.completed(config)
        for rope in self._all_rope_parameters(config):
            found = rope.get("partial_rotary_factor", values.get(self.partial_rotary or "partial_rotary_factor"))
            if found is not None:
                return float(found)
        return 1.0

    def layer_kind(self, config: Mapping[str, Any], layer: int) -> LayerKind:
        """How a layer attends. Raises `CheckpointError` where a list in config.json is too short for it."""
        values = self.completed(config)
        head_dim = self.geometry(config).head_dim
        rotary_dim = int(head_dim * self._partial_rotary_factor(config))
        if self.nope_layers and not self._rotates(values, layer):
            rotary_dim = 0
        return LayerKind(rotary_dim=rotary_dim, window=self._window(values, layer))

    def _rotates(self, values: Mapping[str, Any], layer: int) -> bool:
        listed = values.get(self.nope_layers)
        if listed is None:
            return (layer + 1) % int(values.get(f"{self.nope_layers.removesuffix('s')}_interval") or 4) != 0
        return bool(_entry(listed, layer, self.nope_layers))

    def _window(self, values: Mapping[str, Any], layer: int) -> int | None:
        """The sliding window of a layer, as the transformers class reads it; only for families that may keep such layers."""
        window = values.get("sliding_window")
        if not self.keeps_windows or not isinstance(window, int):
            return None
        types = values.get("layer_types")
        if types is None:
            pattern = int(values.get("sliding_window_pattern") or 1)
            return window if (layer + 1) % pattern else None
        return window if _entry(types, layer, "layer_types") == "sliding_attention" else None


# Fields of config.json whose names speak of attention and that every family may have.
_COMMON_FIELDS = frozenset(
    (
        *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_dropout", "attention_bias"),
        *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "sliding_window"),
        *("use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor", "rope_interleaved"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "is_llama_config"),
        *("attention_probs_dropout_prob", "attn_pdrop", "num_hidden_layers", "_flash_attn_2_enabled"),
        *("original_max_position_embeddings", "_sliding_window_pattern", "sliding_window_pattern"),
    )
)
_ATTENTION_WORDS = re.compile(
    r"attn|attention|rope|rotary|alibi|qk_|_norm_qk|kv_|qkv|window|softcap|position_embedding_type|no_rope|sink|logn|clip_|query|key_"
)


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` for weights that are not plain floating-point numbers."""
    if not config.get("quantization_config"):
        return
    settings = config["quantization_config"]
    method = settings.get("quant_method", "unnamed") if isinstance(settings, Mapping) else "unnamed"
    raise UnsupportedModelError(
        f"config.json: the weights are quantised ({method}), expected float32, bfloat16 or float16; "
        "save a dequantised copy first (model.dequantize() in transformers) and convert that."
    )


def _entry(values: Any, layer: int, name: str) -> Any:
    if not isinstance(values, list) or layer >= len(values):
        raise CheckpointError(
            f"config.json: expected a list with an entry for layer {layer} in {name}, found {values!r}."
        )
    return values[layer]


def _shape(rule: str, values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape that a rule gives; None where its condition does not hold."""
    match = _TENSOR.match(rule)
    assert match is not None
    if match["word"] and bool(values.get(match["field"])) is (match["word"] == "unless"):
        return None
    return tuple(_evaluate(part, values) for part in match["shape"].split(","))


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
    """Value of sums of products, as `a`, `a * b`, `a / b` or `a * b + 2 * c`: fields of config.json and whole numbers."""
    return sum(_product(term.split(), values, expression) for term in expression.split("+"))


def _product(words: Sequence[str], values: Mapping[str, Any], expression: str) -> int:
    result = _number(words[0], values)
    for sign, word in zip(words[1::2], words[2::2], strict=True):
        operand = _number(word, values)
        if sign == "*":
            result *= operand
        elif sign == "/" and result % operand == 0:
            result //= operand
        else:
            raise CheckpointError(
                f"config.json: expected a whole number for {expression}, found {result} {sign} {operand}."
            )
    return result


def _number(word: str, values: Mapping[str, Any]) -> int:
    return int(word) if word.isdigit() else _integer(values, word)

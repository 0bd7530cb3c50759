"""Configuration of a converted model: the source family's own, plus the widths of every MLA layer.

This file is also written beside the weights of converted checkpoints; it needs transformers alone. The class of a family
is made on first use from the class of its source: `XecoLlamaConfig` extends `LlamaConfig`, and so on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MODEL_TYPE_PREFIX = "xeco_"
# Written beside the weights, under these names, so that a checkpoint loads where xeco_convert is not installed.
CODE_FILES = (
    "configuration_xeco.py",
    "modeling_xeco.py",
    "modeling_xeco_multimodal.py",
    "arguments_xeco.py",
    "xeco_latent_attention.py",
    "xeco_choice.py",
)
# Those of xeco_convert/ops, by the name that they have there.
_OF_OPS = {"xeco_latent_attention.py": "torch_attention.py", "xeco_choice.py": "choice.py"}
# Between the name of a model around a text model and the kind of its class: XecoLlavaMultimodalConfig. Without it the
# classes of Gemma 3 would be those of its text model.
MULTIMODAL = "Multimodal"


_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _list_of(value: Any, allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(allowed(item) for item in value)


# What each field of an entry may be, before it is computed with.
_ENTRY_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "kv_lora_rank": lambda value: _whole(value, 1),
    "qk_nope_head_dim": lambda value: _whole(value, 0),
    "qk_rope_head_dim": lambda value: _whole(value, 0) and value % 2 == 0,
    "v_head_dim": lambda value: _whole(value, 1),
    "q_lora_rank": lambda value: value is None or _whole(value, 1),
    "latent_norm": lambda value: isinstance(value, bool),
    "rope_index": lambda value: value is None or _list_of(value, lambda item: _whole(item, 0)),
    "biases": lambda value: _list_of(value, lambda item: item in ("q", "k", "v", "kv_a", "kv_b", "o")),
    "q_norm": lambda value: value in (None, "head", "all"),
    "k_norm": lambda value: value in (None, "head", "all"),
    "logit_softcap": lambda value: value is None or (type(value) in (int, float) and 0 < value < math.inf),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclass(frozen=True, kw_only=True)
class MlaLayer:
    """Widths of one converted layer, as config.json holds them.

    `rope_index` says which source frequency each rotary pair uses; None stands for fresh frequencies of the source's
    rotary type over qk_rope_head_dim. `biases` names the projections that have one: q, kv_a, kv_b, o. `q_norm` is "head" or
    "all" where queries are normalised behind q_proj (each head, or all rows together); q_head_proj then maps each head to
    its un-rotated and rotary rows. `k_norm`, the same of the keys: the source's k_proj, k_norm and v_proj stay (`biases` may
    name k and v), and kv_a_proj_with_mqa reads what they give. `logit_softcap` bounds the scores. A layer without rotation
    has qk_rope_head_dim 0.
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MlaLayer:
        """Read an entry of config.json. Raises `ValueError` naming unknown keys and widths that cannot be."""
        if not isinstance(data, Mapping):
            raise ValueError(f"mla_layers: expected an object or null for each layer, found {_shown(data)}")
        unknown = sorted(set(data) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"mla_layers: unknown keys {_shown(unknown)}; this checkpoint needs a newer xeco-convert")
        for name, allowed in _ENTRY_CHECKS.items():
            if (name in data or name in _WIDTHS) and not allowed(data.get(name)):
                rule = (
                    "widths must be positive and qk_rope_head_dim even" if name in _WIDTHS else "no such value can be"
                )
                raise ValueError(f"mla_layers: {rule}, found {name} = {_shown(data.get(name))}")
        index = data.get("rope_index")
        layer = cls(
            **{**data, "rope_index": None if index is None else tuple(index), "biases": tuple(data.get("biases", ()))}
        )
        if layer.rope_index is not None and len(layer.rope_index) != layer.qk_rope_head_dim // 2:
            raise ValueError(
                f"mla_layers: expected {layer.qk_rope_head_dim // 2} rope_index entries, found {len(layer.rope_index)}"
            )
        return layer

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json: plain JSON types."""
        data = asdict(self)
        return {
            **data,
            "rope_index": None if self.rope_index is None else list(self.rope_index),
            "biases": list(self.biases),
        }

    @property
    def cache_width(self) -> int:
        """Numbers cached per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class CodeBesideWeights:
    """A configuration whose code files are saved with it."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the code files beside it: a copy, or an upload, loads anywhere as well.

        Models save their configuration through this, on one process and before they upload. Classes that were loaded as
        remote code are left to transformers, which copies their files itself.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, file in code_files().items():
            shutil.copyfile(file, Path(save_directory) / name)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class XecoConfigMixin(CodeBesideWeights):
    """What every converted configuration adds to its source's: one entry per layer, None where a layer was kept."""

    mla_layers: list[dict[str, Any] | None] | None
    num_hidden_layers: int

    def layer(self, layer_idx: int) -> MlaLayer | None:
        """Widths of one layer; None where it keeps the source's attention."""
        if self.mla_layers is None or len(self.mla_layers) != self.num_hidden_layers:
            found = None if self.mla_layers is None else len(self.mla_layers)
            raise ValueError(f"config.json: expected {self.num_hidden_layers} entries in mla_layers, found {found}")
        entry = self.mla_layers[layer_idx]
        return None if entry is None else MlaLayer.from_dict(entry)

    def kv_cache_numbers_per_token(self) -> list[int]:
        """Numbers that each layer caches per token: latent and rotary key, or the keys and values of a kept layer."""
        groups = getattr(self, "num_key_value_heads", None) or self.num_attention_heads
        kept = 2 * groups * self.head_dim_or_default()
        layers = [self.layer(index) for index in range(self.num_hidden_layers)]
        return [kept if layer is None else layer.cache_width for layer in layers]

    def head_dim_or_default(self) -> int:
        """head_dim, which some configurations leave to be computed."""
        explicit: int | None = self.__dict__.get("head_dim")
        return explicit or self.hidden_size // self.num_attention_heads

    num_key_value_heads: int
    num_attention_heads: int
    hidden_size: int


def code_files() -> dict[str, Path]:
    """The files that a checkpoint carries, by the name that they have there; none where this is such a file itself."""
    here = Path(__file__).parent
    ops = here.parent / "ops"
    if not ops.is_dir():
        return {}
    return {name: ops / _OF_OPS[name] if name in _OF_OPS else here / name for name in CODE_FILES}


def family_config_class(prefix: str) -> Any:
    """The configuration class of a converted family: `family_config_class("Llama")` is `XecoLlamaConfig`."""
    name = f"Xeco{prefix}Config"
    if name not in globals():
        source = source_class(prefix, "Config")
        attributes = {
            "__module__": __name__,
            "__doc__": f"{source.__name__} of a model whose attention was converted to MLA by xeco-convert.",
            "__annotations__": {"mla_layers": list | None, "conversion": dict | None, "auto_map": dict | None},
            "model_type": f"{MODEL_TYPE_PREFIX}{source.model_type}",
            "mla_layers": None,
            "conversion": None,
            "auto_map": field(default_factory=partial(auto_map, prefix)),
            # The source's tensor-parallel plan names projections that are no more; attention stays whole on each device.
            "base_model_tp_plan": _without_attention(source.base_model_tp_plan),
        }
        globals()[name] = type(name, (XecoConfigMixin, source), attributes)
    return globals()[name]


class XecoMultimodalConfigMixin(CodeBesideWeights):
    """What the configuration of a model around a converted text model adds to its source's."""

    text_config: Any

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the text model's configuration before the source's class would: that knows no converted ones."""
        text = self.text_config
        if isinstance(text, Mapping) and str(text.get("model_type")).startswith(MODEL_TYPE_PREFIX):
            self.text_config = family_config_class(text_class_prefix(text["model_type"]))(**text)
        super().__post_init__(**kwargs)  # type: ignore[misc]


def multimodal_config_class(prefix: str) -> Any:
    """The configuration class of a model around a converted text model: `multimodal_config_class("Llava")` is
    `XecoLlavaMultimodalConfig`."""
    name = f"Xeco{prefix}{MULTIMODAL}Config"
    if name not in globals():
        source = getattr(transformers, f"{prefix}Config")
        attributes = {
            "__module__": __name__,
            "__doc__": f"{source.__name__} of a model whose text model's attention was converted to MLA by xeco-convert.",
            "__annotations__": {"conversion": dict | None, "auto_map": dict | None},
            "model_type": f"{MODEL_TYPE_PREFIX}{source.model_type}",
            "conversion": None,
            "auto_map": field(default_factory=partial(multimodal_auto_map, prefix)),
        }
        globals()[name] = type(name, (XecoMultimodalConfigMixin, source), attributes)
    return globals()[name]


def text_class_prefix(model_type: str) -> str:
    """How the classes of a converted text model's source begin: "Gemma3" for xeco_gemma3_text."""
    source = CONFIG_MAPPING_NAMES[model_type.removeprefix(MODEL_TYPE_PREFIX)]
    return source.removesuffix("Config").removesuffix("Text")


def source_class(prefix: str, kind: str) -> Any:
    """The transformers class of a family: that of the text model where it has several (Gemma3TextModel)."""
    return getattr(transformers, f"{prefix}Text{kind}", None) or getattr(transformers, f"{prefix}{kind}")


def auto_map(prefix: str) -> dict[str, str]:
    """Which class of the files beside the weights each Auto class loads, for machines without this package."""
    return {
        "AutoConfig": f"configuration_xeco.Xeco{prefix}Config",
        "AutoModel": f"modeling_xeco.Xeco{prefix}Model",
        "AutoModelForCausalLM": f"modeling_xeco.Xeco{prefix}ForCausalLM",
    }


def multimodal_auto_map(prefix: str) -> dict[str, str]:
    """The same for a model around a text model."""
    name = f"Xeco{prefix}{MULTIMODAL}"
    whole = f"modeling_xeco_multimodal.{name}ForConditionalGeneration"
    return {
        "AutoConfig": f"configuration_xeco.{name}Config",
        "AutoModel": f"modeling_xeco_multimodal.{name}Model",
        "AutoModelForImageTextToText": whole,
        "AutoModelForCausalLM": whole,
    }


def _without_attention(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if plan is None else {name: how for name, how in plan.items() if ".self_attn." not in name}


def __getattr__(name: str) -> Any:
    """`configuration_xeco.XecoLlamaConfig` and its kin, made on first use."""
    if name.startswith("Xeco") and name.endswith("Config"):
        prefix = name.removeprefix("Xeco").removesuffix("Config")
        if prefix.endswith(MULTIMODAL):
            return multimodal_config_class(prefix.removesuffix(MULTIMODAL))
        return family_config_class(prefix)
    raise AttributeError(f"module {__name__} has no attribute {name}")

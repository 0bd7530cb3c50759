"""Configuration of a converted model: the source family's own, plus the widths of every MLA layer.

This file is also written beside the weights of converted checkpoints; it needs transformers alone. The class of a family
is made on first use from the class of its source: `XecoLlamaConfig` extends `LlamaConfig`, and so on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .layer_xeco import MlaLayer

MODEL_TYPE_PREFIX = "xeco_"
# Written beside the weights, under these names, so that a checkpoint loads where xeco_convert is not installed.
CODE_FILES = (
    "configuration_xeco.py",
    "modeling_xeco.py",
    "attention_xeco.py",
    "modeling_xeco_multimodal.py",
    "arguments_xeco.py",
    "layer_xeco.py",
    "xeco_latent_attention.py",
    "xeco_choice.py",
    "xeco_packed_rows.py",
)
# Those of xeco_convert/ops, by the name that they have there.
_OF_OPS = {
    "xeco_latent_attention.py": "torch_attention.py",
    "xeco_choice.py": "choice.py",
    "xeco_packed_rows.py": "packed_rows.py",
}
# Between the name of a model around a text model and the kind of its class: XecoLlavaMultimodalConfig. Without it the
# classes of Gemma 3 would be those of its text model.
MULTIMODAL = "Multimodal"


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
            count = None if self.mla_layers is None else len(self.mla_layers)
            raise ValueError(f"config.json: expected {self.num_hidden_layers} entries in mla_layers, found {count}")
        entry = self.mla_layers[layer_idx]
        return None if entry is None else MlaLayer.from_dict(entry)

    def kv_cache_numbers_per_token(self) -> list[int]:
        """Numbers that each layer caches per token: latent and rotary key, or the keys and values of a kept layer."""
        groups = getattr(self, "num_key_value_heads", None) or self.num_attention_heads
        kept_width = 2 * groups * self.head_dim_or_default()
        layers = [self.layer(index) for index in range(self.num_hidden_layers)]
        return [kept_width if layer is None else layer.cache_width for layer in layers]

    def head_dim_or_default(self) -> int:
        """head_dim, which some configurations leave to be computed."""
        explicit: int | None = self.__dict__.get("head_dim")
        return explicit or self.hidden_size // self.num_attention_heads

    num_key_value_heads: int
    num_attention_heads: int
    hidden_size: int


def norm_eps(config: Any) -> float:
    """The eps of the norms, under the name that the family gives it."""
    eps: float = getattr(config, "rms_norm_eps", None) or config.layer_norm_eps
    return eps


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
    names = {"self_attn", "attention"}  # the second is GPT-NeoX's
    return None if plan is None else {name: how for name, how in plan.items() if names.isdisjoint(name.split("."))}


def __getattr__(name: str) -> Any:
    """`configuration_xeco.XecoLlamaConfig` and its kin, made on first use."""
    if name.startswith("Xeco") and name.endswith("Config"):
        prefix = name.removeprefix("Xeco").removesuffix("Config")
        if prefix.endswith(MULTIMODAL):
            return multimodal_config_class(prefix.removesuffix(MULTIMODAL))
        return family_config_class(prefix)
    raise AttributeError(f"module {__name__} has no attribute {name}")

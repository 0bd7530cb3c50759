"""The model that converted checkpoints load with: the source's own class, its attention replaced by latent attention.

This file is also written beside the weights of converted checkpoints; it needs torch and transformers alone. The classes of a
family are made on first use from those of its source: `XecoLlamaForCausalLM` extends `LlamaForCausalLM`, and so on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from .attention_xeco import LatentSelfAttention
from .configuration_xeco import family_config_class, source_class


class XecoModelMixin:
    """What every converted model adds to its source's class."""

    _supports_flash_attn = False  # attention over latents is this project's own, not one of transformers' kernels
    _supports_flex_attn = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Eager and SDPA may be switched at run time; transformers looks for a pattern in the source that is not ours."""
        return True

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """As transformers decides, but nothing that attention over latents would ignore (paged, registered by a user)."""
        chosen: str = super().get_correct_attn_implementation(requested_attention, *args, **kwargs)  # type: ignore[misc]
        if chosen not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation: expected sdpa or eager for {type(self).__name__}, whose attention over latents is its "
                f"own, found {chosen}"
            )
        return chosen

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see `_NO_PAGES`."""
        raise ValueError(f"{type(self).__name__}: {_NO_PAGES}")

    @property
    def init_continuous_batching(self) -> NoReturn:
        """Not there, so that `transformers serve --continuous-batching` says so and serves without it."""
        raise AttributeError

    def __getattr__(self, name: str) -> Any:
        if name == "init_continuous_batching":
            raise AttributeError(f"{type(self).__name__}: {_NO_PAGES}")
        return super().__getattr__(name)  # type: ignore[misc]


_NO_PAGES = (
    "continuous batching keeps the cache in pages of keys and values, which attention over latents does not read; use "
    "model.generate, with left padding for a batch"
)


def family_model_class(prefix: str, kind: str) -> Any:
    """The model class of a converted family: `family_model_class("Llama", "ForCausalLM")` is `XecoLlamaForCausalLM`."""
    name = f"Xeco{prefix}{kind}"
    if name not in globals():
        source = source_class(prefix, kind)

        def initialise(self: Any, config: Any) -> None:
            source.__init__(self, config)
            replace_attention(self.base_model, config)
            self.post_init()

        globals()[name] = model_class(name, __name__, source, family_config_class(prefix), initialise)
    return globals()[name]


def model_class(name: str, module: str, source: Any, config_class: Any, initialise: Callable[[Any, Any], None]) -> Any:
    """A class of converted models that extends the source's; it belongs to `module`, where unpickling looks for it."""
    register_weight_conversion(source, name, config_class.model_type)
    # Postponed annotations are strings; who checks arguments against them (vLLM's support_torch_compile) expects classes.
    initialise.__annotations__ = {}
    attributes = {
        "__module__": module,
        "__doc__": f"{source.__name__} whose attention was converted to MLA by xeco-convert.",
        "__init__": initialise,
        "config_class": config_class,
    }
    return type(name, (XecoModelMixin, source), attributes)


def register_weight_conversion(source: Any, name: str, model_type: str) -> None:
    """Checkpoints of a converted family store weights as those of its source do (experts one by one, for one): transformers
    looks up the conversion of names by class or by model_type."""
    from transformers import conversion_mapping as conversions

    for source_key, own in ((source.__name__, name), (source.config_class.model_type, model_type)):
        mapping = conversions.get_checkpoint_conversion_mapping(source_key)
        if mapping is not None and conversions.get_checkpoint_conversion_mapping(own) is None:
            conversions.register_checkpoint_conversion_mapping(own, mapping)


def replace_attention(model: Any, config: Any) -> None:
    """Put latent attention in the converted layers of a decoder that its source's class has just built."""
    for layer_idx, decoder_layer in enumerate(model.layers):
        layer = config.layer(layer_idx)
        if layer is not None:
            # self_attn, or attention (GPT-NeoX): transformers' own classes say which it is
            name, source = next(
                part for part in decoder_layer.named_children() if type(part[1]).__name__.endswith("Attention")
            )
            attention_class = _attention_class(type(source))
            setattr(decoder_layer, name, attention_class(config, source, layer, type(model.rotary_emb)))


def _attention_class(source_class: type[nn.Module]) -> Any:
    """Latent attention that is also an instance of the source's attention class, by which transformers finds the
    attention modules of a model (output_attentions, for one)."""
    name = f"Xeco{source_class.__name__}"
    if name not in globals():
        globals()[name] = type(name, (LatentSelfAttention, source_class), {"__module__": __name__})
    return globals()[name]


def __getattr__(name: str) -> Any:
    """`modeling_xeco.XecoLlamaForCausalLM` and its kin, made on first use: by name, as unpickling does, too."""
    for kind in ("ForCausalLM", "Model", "Attention"):
        prefix = name.removeprefix("Xeco").removesuffix(kind)
        if name == f"Xeco{prefix}{kind}" and prefix:
            if kind == "Attention":
                module = sys.modules[source_class(prefix, "ForCausalLM").__module__]
                return _attention_class(getattr(module, f"{prefix}{kind}"))
            return family_model_class(prefix, kind)
    raise AttributeError(f"module {__name__} has no attribute {name}")

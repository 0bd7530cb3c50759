"""Models of text and images around a converted text model: the source's own classes, which build the converted one.

This file is also written beside the weights of converted checkpoints. The classes are made on first use from those of the
source: `XecoLlavaMultimodalForConditionalGeneration` extends `LlavaForConditionalGeneration`, and so on.
"""

from __future__ import annotations

from typing import Any

import transformers

from .configuration_xeco import MULTIMODAL, multimodal_config_class
from .modeling_xeco import family_model_class, model_class

_KINDS = ("ForConditionalGeneration", "Model")


def multimodal_model_class(prefix: str, kind: str) -> Any:
    """`multimodal_model_class("Llava", "Model")` is `XecoLlavaMultimodalModel`."""
    name = f"Xeco{prefix}{MULTIMODAL}{kind}"
    if name not in globals():
        source = getattr(transformers, f"{prefix}{kind}")

        def initialise(self: Any, config: Any) -> None:
            _register_text_model(config.text_config)
            source.__init__(self, config)

        globals()[name] = model_class(name, __name__, source, multimodal_config_class(prefix), initialise)
    return globals()[name]


def _register_text_model(config: Any) -> None:
    """The source's class builds its text model by AutoModel, which finds it by the class of its configuration."""
    prefix = type(config).__name__.removeprefix("Xeco").removesuffix("Config")
    if type(config).__name__ == f"Xeco{prefix}Config":
        transformers.AutoModel.register(type(config), family_model_class(prefix, "Model"), exist_ok=True)


def __getattr__(name: str) -> Any:
    """`modeling_xeco_multimodal.XecoLlavaMultimodalModel` and its kin, made on first use."""
    for kind in _KINDS:
        if name.startswith("Xeco") and name.endswith(f"{MULTIMODAL}{kind}"):
            return multimodal_model_class(name.removeprefix("Xeco").removesuffix(f"{MULTIMODAL}{kind}"), kind)
    raise AttributeError(f"module {__name__} has no attribute {name}")

"""Models of text and images whose decoder of text is a family's own class: it is converted in its place, the rest is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xeco_convert.errors import UnsupportedModelError

# model_type -> how transformers' classes begin. Each holds the decoder of text as one module, calls it as a text model does,
# and multiplies what comes out with the output head.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "Gemma3",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "mistral3": "Mistral3",
    "smolvlm": "SmolVLM",
}


def wrapper_of(config: Mapping[str, Any]) -> str | None:
    """How the classes of a model around a text model begin, from its config.json; None for a text model alone."""
    model_type = config.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def refuse_other_wrappers(model_type: str, text: Mapping[str, Any], supported: Mapping[str, object]) -> None:
    """Raise `UnsupportedModelError` for a model around a text model that is not converted, with what can be done."""
    tower = text.get("model_type", "unnamed")
    start = f"config.json: {model_type!r} wraps a text model ({tower!r}"
    if tower not in supported:
        raise UnsupportedModelError(
            f"{start}), which is no supported family; the text models that are converted are {', '.join(supported)}."
        )
    raise UnsupportedModelError(
        f"{start}) together with other modalities in a way that is not converted; whole models are converted for "
        f"{', '.join(WRAPPERS)}. Its text model alone can be: docs/faq.md says how to save it."
    )

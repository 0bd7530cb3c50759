"""Which families there are: the TOML files of this folder, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError, shown
from xeco_convert.families.multimodal import refuse_other_wrappers
from xeco_convert.families.spec import FamilySpec


@cache
def supported_model_types() -> dict[str, FamilySpec]:
    """All families by model_type, in alphabetical order."""
    specs = (FamilySpec.from_toml(path) for path in sorted(Path(__file__).parent.glob("*.toml")))
    return {spec.model_type: spec for spec in specs}


def family_for(config: Mapping[str, Any]) -> FamilySpec:
    """The family of a text model's config.json. Raises `CheckpointError` or `UnsupportedModelError`, naming the families."""
    model_type = config.get("model_type")
    supported = ", ".join(supported_model_types())
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"config.json: expected a model_type, found {shown(model_type)}; supported are {supported}."
        )
    if model_type.startswith("xeco_"):
        raise UnsupportedModelError(
            f"config.json: model_type {shown(model_type)} is already converted; give the source model, or "
            "`xeco-convert inspect` it."
        )
    _refuse_wrappers_and_encoders(config, model_type)
    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"config.json: model_type {shown(model_type)} is not a supported family; supported are {supported}."
        )
    return supported_model_types()[model_type]


def family_within(model_type: str, text: Mapping[str, Any]) -> FamilySpec:
    """The family of the text model within a model of `model_type`; `text`: its configuration, as transformers resolved it."""
    if text.get("model_type") not in supported_model_types():
        refuse_other_wrappers(model_type, text, supported_model_types())
    return family_for(text)


def _refuse_wrappers_and_encoders(config: Mapping[str, Any], model_type: str) -> None:
    """Models that hold more than one decoder of text, or none: say what they are and what can be converted."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and model_type not in supported_model_types():
        refuse_other_wrappers(model_type, text, supported_model_types())
    stated = config.get("architectures")
    architectures = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    encoders = ("ForMaskedLM", "EncoderModel", "ForConditionalGeneration")
    if config.get("is_encoder_decoder") or any(name.endswith(encoders) for name in architectures):
        kind = "an encoder-decoder" if config.get("is_encoder_decoder") else "no decoder of text alone"
        raise UnsupportedModelError(
            f"config.json: {shown(model_type)} is {kind}; expected a decoder-only language model, whose KV cache grows with the "
            f"text. Supported are {', '.join(supported_model_types())}."
        )

"""Which families there are: the TOML files of this folder, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError, shown
from xeco_convert.families.spec import FamilySpec


@cache
def supported_model_types() -> dict[str, FamilySpec]:
    """All families by model_type, in alphabetical order."""
    specs = (FamilySpec.from_toml(path) for path in sorted(Path(__file__).parent.glob("*.toml")))
    return {spec.model_type: spec for spec in specs}


def family_for(config: Mapping[str, Any]) -> FamilySpec:
    """The family of a source's config.json. Raises `CheckpointError` or `UnsupportedModelError`, naming the families."""
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


def _refuse_wrappers_and_encoders(config: Mapping[str, Any], model_type: str) -> None:
    """Models that hold more than one decoder of text, or none: say what they are and what can be converted."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and model_type not in supported_model_types():
        tower = text.get("model_type", "unnamed")
        known = "is a supported family" if tower in list(supported_model_types()) else "is no supported family either"
        raise UnsupportedModelError(
            f"config.json: {shown(model_type)} wraps a text model ({shown(tower)}, which {known}) together with other "
            "modalities; only text models are converted. Save the text model alone and convert that: "
            'AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(new_folder).'
        )
    stated = config.get("architectures")
    architectures = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    encoders = ("ForMaskedLM", "EncoderModel", "ForConditionalGeneration")
    if config.get("is_encoder_decoder") or any(name.endswith(encoders) for name in architectures):
        kind = "an encoder-decoder" if config.get("is_encoder_decoder") else "no decoder of text alone"
        raise UnsupportedModelError(
            f"config.json: {shown(model_type)} is {kind}; expected a decoder-only language model, whose KV cache grows with the "
            f"text. Supported are {', '.join(supported_model_types())}."
        )

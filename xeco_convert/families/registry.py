"""Which families there are: the TOML files of this folder, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xeco_convert.errors import CheckpointError, UnsupportedModelError
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
        raise CheckpointError(f"config.json: expected a model_type, found {model_type!r}; supported are {supported}.")
    if model_type.startswith("xeco_"):
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is already converted; give the source model, or `xeco-convert inspect` it."
        )
    if model_type not in supported_model_types():
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not a supported family; supported are {supported}."
        )
    return supported_model_types()[model_type]

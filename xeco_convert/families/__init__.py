"""Model families as data: one TOML file each. See docs/adding_a_family.md."""

from xeco_convert.families.multimodal import WRAPPERS, wrapper_of
from xeco_convert.families.registry import family_for, family_within, supported_model_types
from xeco_convert.families.spec import AttentionGeometry, FamilySpec, LayerKind

__all__ = [
    "WRAPPERS",
    "AttentionGeometry",
    "FamilySpec",
    "LayerKind",
    "family_for",
    "family_within",
    "supported_model_types",
    "wrapper_of",
]

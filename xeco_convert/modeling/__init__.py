"""The configuration and model that converted checkpoints load with; both files are also written beside the weights."""

from xeco_convert.modeling.configuration_xeco import CODE_FILES, MlaLayer, code_files, family_config_class
from xeco_convert.modeling.modeling_xeco import LatentSelfAttention, family_model_class

__all__ = [
    "CODE_FILES",
    "LatentSelfAttention",
    "MlaLayer",
    "code_files",
    "family_config_class",
    "family_model_class",
    "register",
]


def register(class_prefixes: list[str]) -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know the converted families, given their class prefixes."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for prefix in class_prefixes:
        config_class = family_config_class(prefix)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, family_model_class(prefix, "Model"), exist_ok=True)
        AutoModelForCausalLM.register(config_class, family_model_class(prefix, "ForCausalLM"), exist_ok=True)

"""The configuration and model that converted checkpoints load with; both files are also written beside the weights."""

from xeco_convert.modeling.attention_xeco import LatentSelfAttention
from xeco_convert.modeling.configuration_xeco import CODE_FILES, code_files, family_config_class
from xeco_convert.modeling.layer_xeco import MlaLayer
from xeco_convert.modeling.modeling_xeco import family_model_class

__all__ = [
    "CODE_FILES",
    "LatentSelfAttention",
    "MlaLayer",
    "code_files",
    "family_config_class",
    "family_model_class",
]

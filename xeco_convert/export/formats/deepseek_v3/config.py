"""config.json of a stock DeepSeek-V3 without experts."""

from __future__ import annotations

from typing import Any

from xeco_convert.export.formats.deepseek_v3.layout import ExportLayout

# Fields of the source that stay as they are.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)


def stock_config(layout: ExportLayout, dtype: str) -> dict[str, Any]:
    """config.json of a dense DeepSeek-V3: every layer below first_k_dense_replace, no shared or routed expert in use."""
    values = layout.config
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: values[name] for name in _SAME if values.get(name) is not None},
        "num_key_value_heads": layout.geometry.num_attention_heads,
        "hidden_act": values.get("hidden_act", "silu"),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "q_lora_rank": None,
        **layout.widths,
        "rope_parameters": dict(layout.rotary.settings),
        "rope_theta": layout.rotary.settings["rope_theta"],
        "rope_interleave": True,
        "first_k_dense_replace": layout.geometry.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": values["intermediate_size"],
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "dtype": dtype,
        **layout.engine_fields,
    }

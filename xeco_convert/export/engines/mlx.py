"""mlx-lm's DeepSeek-V3 class (Apple silicon, and CPUs): any width, from a cache of latents."""

from xeco_convert.export.engines.engine import ENGINES, Engine

ENGINES.add(
    Engine(
        name="mlx",
        order=5,
        rope_types=("default", "linear", "llama3", "yarn"),
        rope_reason="mlx-lm has no such type, or computes it otherwise",
        norm_eps=1e-6,  # a constant of its code
        # it does not look into rope_parameters: without this, a scaling would be left out and nothing said
        scaling_field="rope_scaling",
        scaling_fields=(
            "rope_type",
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
        ),
        most_layers=61,
        layers_reason="mlx-lm drops the weights of layer 61, which in DeepSeek-V3 itself is for prediction only",
    )
)

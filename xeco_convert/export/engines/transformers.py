"""transformers' own DeepSeek-V3 class, in plain torch: any width."""

from xeco_convert.export.engines.engine import ENGINES, Engine

ENGINES.add(
    Engine(
        name="transformers",
        order=0,
        rope_types=("default", "linear", "llama3", "yarn", "dynamic"),
        rope_reason="the class has no such type",
        norm_eps=1e-6,  # a constant of its code
    )
)

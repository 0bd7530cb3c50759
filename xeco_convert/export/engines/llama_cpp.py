"""llama.cpp's deepseek2 graph, through its converter to GGUF."""

from xeco_convert.export.engines.engine import ENGINES, Engine

ENGINES.add(
    Engine(
        name="llama.cpp",
        order=4,
        rope_reason="llama.cpp's deepseek2 graph ignores it",
        # the converter takes null for "a Lite model", by which llama.cpp then guesses from the number of layers
        config={"q_lora_rank": 0, "n_group": None, "topk_group": None},
    )
)

"""vLLM's DeepSeek class, by the widths of its attention kernels."""

from xeco_convert.export.engines.engine import DEEPSEEK_HEADS, ENGINES, Engine, HeadWidths

VLLM = ENGINES.add(
    Engine(
        name="vllm",
        order=1,
        heads=(*DEEPSEEK_HEADS, HeadWidths(nope=192, rope=64, v=256)),
        ranks=(256, 448, 512),
        rope_reason="vLLM's DeepSeek class replaces it by YaRN or refuses it",
    )
)

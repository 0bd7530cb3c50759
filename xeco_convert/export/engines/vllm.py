"""vLLM's DeepSeek class on GPUs, by the widths of its attention kernels."""

from xeco_convert.export.engines.engine import ENGINES, VLLM_HEADS, VLLM_PADDING, Engine

ENGINES.add(
    Engine(
        name="vllm",
        order=1,
        heads=VLLM_HEADS,
        ranks=(256, 448, 512),
        rope_reason="vLLM's DeepSeek class replaces it by YaRN or refuses it",
        padding_advice=VLLM_PADDING,
    )
)

"""vLLM's DeepSeek class on CPUs: its decode kernel knows one width of the cache, DeepSeek's own 512 + 64."""

from xeco_convert.export.engines.engine import ENGINES, VLLM_HEADS, VLLM_PADDING, Engine

ENGINES.add(
    Engine(
        name="vllm-cpu",
        order=2,
        heads=VLLM_HEADS,
        ranks=(512,),
        rope_reason="vLLM's DeepSeek class replaces it by YaRN or refuses it",
        padding_advice=VLLM_PADDING,
    )
)

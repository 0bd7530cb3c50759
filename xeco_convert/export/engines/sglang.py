"""SGLang's DeepSeek class, by the widths of its attention kernels."""

from xeco_convert.export.engines.engine import DEEPSEEK_HEADS, ENGINES, Engine

ENGINES.add(
    Engine(
        name="sglang",
        order=3,
        heads=DEEPSEEK_HEADS,
        ranks=(256, 512),
        rope_reason="SGLang's DeepSeek class reads it as YaRN",
    )
)

"""Engines that load stock checkpoints, one file each.

Sources: transformers 5.23 and mlx-lm 0.32.2 (run by tests); vLLM 0.33, SGLang 0.5.23 and llama.cpp of autumn 2026 as read and
tried for docs/exporting.md and docs/serving.md.
"""

from xeco_convert.export.engines.engine import DEEPSEEK_HEADS, ENGINES, VLLM_HEADS, Engine, HeadWidths

__all__ = ["DEEPSEEK_HEADS", "ENGINES", "VLLM_HEADS", "Engine", "HeadWidths"]

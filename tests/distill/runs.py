"""Options of healing runs that end in seconds."""

from __future__ import annotations

from typing import Any

from xeco_distill.options import DistillOptions

# 16 steps of 128 tokens, 2 rows to measure on
QUICK: dict[str, Any] = {
    "seq_length": 64,
    "batch_size": 2,
    "budget_tokens": 2048,
    "held_out_tokens": 256,
    "stages": "kl",
    "learning_rate": 1.3e-3,
    "device": "cpu",
}


def quick(**fields: Any) -> DistillOptions:
    return DistillOptions(**{**QUICK, **fields})

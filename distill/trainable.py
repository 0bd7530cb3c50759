"""Which weights of a student are trained."""

from __future__ import annotations

from typing import Any

from xeco_convert.errors import OptionError

from .attention import attention_modules


def choose_trained(model: Any, train: str) -> int:
    """Mark what is trained: attention (of converted layers), norms (and all norms), or all. Returns how many numbers."""
    attention = {parameter for module in attention_modules(model).values() for parameter in module.parameters()}
    norms = {
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    chosen = attention | norms if train == "norms" else attention
    for parameter in model.parameters():
        parameter.requires_grad_(train == "all" or parameter in chosen)
    trained: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == 0:
        raise OptionError("--train: this model has no converted layer to train; use --train all.")
    return trained

"""Where the tests of the ops run: the instruction sets of the extension that this machine has, and its GPU."""

from __future__ import annotations

import warnings

import torch

from xeco_convert.ops.extension import CPU_LEVELS, extension


def available_levels() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one warning where the extension is missing
        module = extension()
    on_gpu = ["cuda"] if torch.cuda.is_available() else []
    if module is None:
        return ["reference", *on_gpu]
    highest = CPU_LEVELS.index(module.detected_level)
    return [*(level for level in module.compiled_levels if CPU_LEVELS.index(level) <= highest), *on_gpu]


LEVELS = available_levels()
BEST_LEVEL = [level for level in LEVELS if level != "cuda"][-1]

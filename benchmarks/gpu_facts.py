"""What a figure of a GPU means nothing without."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

import torch

from xeco_convert.ops.extension import kernel_obstacle


def refuse_without_kernels(parser: argparse.ArgumentParser) -> None:
    """End with exit code 2 and a sentence where there is no GPU, or no kernels for it."""
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    obstacle = kernel_obstacle("cuda", torch.bfloat16)
    if obstacle:
        parser.error(f"{obstacle}: XECO_BUILD_DEVICE=1 python setup.py build_ext --inplace")


def gpu_facts() -> dict[str, Any]:
    """Name, memory, driver, clocks before the measurement."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": smi("driver_version"),
        "cuda": torch.version.cuda or torch.version.hip,
        "clocks_before": smi("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    }


def smi(*fields: str) -> str | None:
    """What nvidia-smi says; it changes nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

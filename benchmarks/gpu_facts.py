"""What a figure of a GPU means nothing without."""

from __future__ import annotations

import subprocess
from typing import Any

import torch


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

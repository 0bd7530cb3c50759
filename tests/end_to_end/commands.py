"""Types of what the end-to-end fixtures give."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Runner = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Converted:
    """A conversion by the command: what it wrote and said."""

    source: Path
    output: Path
    report: dict[str, Any]
    stdout: str
    stderr: str

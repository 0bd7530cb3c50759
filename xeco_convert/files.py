"""Files that are there whole or not at all, and what tells whether a file is still the one that a run began with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name beside it, then put it in place; a failure leaves what was there before.

    Raises what `write` raises, and `OSError`.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text_whole(file: Path, text: str) -> None:
    """The same for a text, in UTF-8."""
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json_whole(file: Path, data: Any) -> None:
    """The same for JSON types."""
    write_text_whole(file, json.dumps(data, indent=2) + "\n")


def file_identity(file: Path) -> tuple[str, int, int]:
    """Name, size in bytes, and time of the last change in nanoseconds."""
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns

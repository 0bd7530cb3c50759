"""Copies of a checkpoint that lack some of its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copy_without(tmp_path: Path) -> Callable[[Path, str], Path]:
    """copy_without(folder, start): a copy without the files whose names begin so."""

    def copy(folder: Path, start: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(f"{start}*")))

    return copy

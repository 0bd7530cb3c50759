"""The two emulated machines, built once for a test session."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))  # operands.py: inputs and the rule of errors

from emulated import LANES, Emulated, build


@pytest.fixture(scope="session", params=LANES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Warps of 32 lanes with mma.sync, then waves of 64 lanes with MFMA."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return build(request.param, tmp_path_factory.mktemp("device"))


@pytest.fixture
def gpu(library: ctypes.CDLL) -> Emulated:
    """With the shared memory of the smallest machine that its tiles are meant for first: sm_80 (163 KB), CDNA (64 KB)."""
    return Emulated(library=library, max_shared_bytes=163 * 1024 if library.emulated_lanes() == 32 else 64 * 1024)

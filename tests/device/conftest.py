"""Where the device kernels run: on two emulated machines, built once for a test session, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))  # operands.py: inputs and the rule of errors

from emulated import LANES, Emulated, build, compiler_of_host
from real import Real

# The shared memory of the smallest machine that the first tiles are meant for: sm_80, CDNA.
SHARED_BYTES = {"mma": 163 * 1024, "mfma": 64 * 1024}


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def libraries(build_folder: Path) -> dict[str, ctypes.CDLL]:
    """Filled by those who need one."""
    return {}


@pytest.fixture(params=LANES)
def library(request: pytest.FixtureRequest, build_folder: Path, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    """Warps of 32 lanes with mma.sync, then waves of 64 lanes with MFMA."""
    return load(request.param, build_folder, libraries)


# tests/ops/test_elsewhere.py says, by one skipped test, where no GPU is present
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=[*LANES, *ON_GPU])
def gpu(request: pytest.FixtureRequest, build_folder: Path, libraries: dict[str, ctypes.CDLL]) -> Emulated | Real:
    """Both emulated machines, then the real one."""
    if request.param == "cuda":
        return Real()
    library = load(request.param, build_folder, libraries)
    return Emulated(library=library, max_shared_bytes=SHARED_BYTES[request.param])


@pytest.fixture
def emulated(library: ctypes.CDLL) -> Emulated:
    """For what would end a real GPU's context."""
    return Emulated(library=library)


def load(machine: str, folder: Path, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    if compiler_of_host() is None:
        pytest.skip("no C++ compiler")
    if machine not in libraries:
        with FileLock(folder / f"{machine}.lock"):
            libraries[machine] = build(machine, folder)
    return libraries[machine]

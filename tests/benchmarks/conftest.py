"""The benchmarks are scripts of a folder, not a package: their tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pytest

from xeco_convert.ops.extension import extension


@pytest.fixture
def needs_extension() -> None:
    """Skips where the package was built without compiled kernels (XECO_BUILD_EXT=0): there is nothing to time then."""
    if extension() is None:
        pytest.skip("the extension is not built")

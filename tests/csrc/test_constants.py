"""What C++ and Python both say, of the kernels' limits and of the levels of the CPU's kernels, is the same."""

from pathlib import Path

import pytest

from xeco_convert.ops._latent_attention import _MAX_POSITION
from xeco_convert.ops._latent_attention_decode import _MAX_SPLITS
from xeco_convert.ops.choice import MAX_RANK, MAX_ROPE
from xeco_convert.ops.extension import CPU_LEVELS, extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")


@needs_extension
def test_the_limits_of_the_kernels() -> None:
    module = extension()
    assert module is not None
    expected = {"rank": MAX_RANK, "rope": MAX_ROPE, "splits": _MAX_SPLITS, "position": _MAX_POSITION}
    assert module.limits == expected


@needs_extension
def test_the_levels_and_their_files() -> None:
    module = extension()
    assert module is not None
    assert tuple(module.cpu_levels) == CPU_LEVELS
    assert set(module.compiled_levels) <= set(CPU_LEVELS)
    assert all((CSRC / f"latent_attention/cpu/{level}.cpp").is_file() for level in CPU_LEVELS)

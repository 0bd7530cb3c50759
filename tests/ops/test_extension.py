"""The loader of the compiled kernels: on first use, once, and plain torch with one warning where they are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

from xeco_convert.ops.extension import CPU_LEVELS, extension

SMALL_CALL = """
import torch
from xeco_convert.ops import latent_attention
tensors = [torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 8), torch.randn(1, 5, 16), torch.randn(1, 5, 8)]
def call():
    return latent_attention(*tensors, softmax_scale=0.3)[0]
"""
MISSING = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xeco_convert._C" else found(name, *rest)
"""
needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own, into which nothing of this project is imported yet."""
    return run_fresh(code, environment={**_environment(), **environment}, timeout=120)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("XECO_CPU_LEVEL", "XECO_EXTENSION")}


@pytest.mark.slow
def test_importing_loads_nothing_and_says_nothing() -> None:
    code = (
        "import sys, xeco_convert\nassert 'torch' not in sys.modules\nimport xeco_convert.ops\n"
        "assert 'xeco_convert._C' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@needs_extension
def test_the_first_call_of_an_op_loads_the_extension_and_runs_its_kernel() -> None:
    code = SMALL_CALL + (
        "import sys\nfirst = call()\nassert 'xeco_convert._C' in sys.modules\n"
        "assert torch.equal(first, call())\n"
        "try:\n    torch.ops.xeco.latent_attention(*[t.double() for t in tensors], None, None, None, 0.3, True, 0, 0.0)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "the fused CPU kernels take float32, bfloat16 and float16" in done.stdout


def test_without_the_extension_there_is_one_warning_and_the_same_result() -> None:
    code = (
        MISSING
        + SMALL_CALL
        + (
            "first = call()\ncall()\nassert 'xeco_convert._C' not in sys.modules\n"
            "wide = latent_attention(*[t.double() for t in tensors], softmax_scale=0.3)[0]\n"
            "assert (first - wide).abs().max() < 1e-5\n"
        )
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("xeco_convert was installed without its extension; attention runs in plain torch") == 1


@needs_extension
@pytest.mark.parametrize("level", [CPU_LEVELS[0], CPU_LEVELS[1], CPU_LEVELS[-1]])
def test_the_environment_caps_the_level(level: str) -> None:
    module = extension()
    assert module is not None
    done = run(SMALL_CALL + "call()\nimport xeco_convert._C as C\nprint(C.cpu_level())", XECO_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    lower = min(level, module.detected_level, key=CPU_LEVELS.index)
    assert done.stdout.strip() == lower


def test_a_level_that_does_not_exist_is_refused() -> None:
    done = run(SMALL_CALL + "call()", XECO_CPU_LEVEL="sse9")
    assert done.returncode == 1
    assert f"XECO_CPU_LEVEL: expected one of {', '.join(CPU_LEVELS)}, found 'sse9'" in done.stderr


def test_a_build_that_is_asked_for_and_not_there_is_refused(tmp_path: Path) -> None:
    done = run(SMALL_CALL + "call()", XECO_EXTENSION=str(tmp_path / "no.so"))
    assert done.returncode == 1
    assert f"XECO_EXTENSION: '{tmp_path / 'no.so'}' could not be loaded as xeco_convert._C" in done.stderr


@needs_extension
def test_another_build_may_be_loaded_by_its_path() -> None:
    module = extension()
    assert module is not None and module.__file__ is not None
    code = MISSING + SMALL_CALL + "call()\nprint(sys.modules['xeco_convert._C'].__file__)"
    done = run(code, XECO_EXTENSION=module.__file__)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == module.__file__ and done.stderr == ""


@needs_extension
def test_a_build_from_another_version_is_refused() -> None:
    done = run("import xeco_convert\nxeco_convert.__version__ = '99.0'\n" + SMALL_CALL + "call()")
    assert done.returncode == 1
    assert "xeco_convert is version 99.0, but its extension" in done.stderr and "build it again" in done.stderr


@needs_extension
def test_facts_of_the_build() -> None:
    module = extension()
    assert module is not None
    assert set(module.compiled_levels) <= set(CPU_LEVELS) and module.detected_level in CPU_LEVELS
    assert module.device_archs == [] and module.torch_target == "2.10"
    expected = f"expected {', '.join(CPU_LEVELS[:-1])} or {CPU_LEVELS[-1]}, found 'sse9'"
    with pytest.raises(ValueError, match=expected):
        module.set_cpu_level("sse9")

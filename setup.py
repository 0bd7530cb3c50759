"""Builds the extension, and nothing else; everything about the package is in pyproject.toml.

XECO_BUILD_EXT=0 leaves the extension out, =1 demands it. Unset: it is built where torch and a C++ compiler are at hand, and
left out with a line that says so where they are not (the package then runs in plain torch).
XECO_EMULATE_AMX=1 and XECO_CXXFLAGS are for tests and sanitizers: csrc/README.md.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# 2.10: the oldest torch whose stable ABI has all that is used; the binary runs on that and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"


def wanted() -> bool:
    """Whether to build. Exits with a sentence where XECO_BUILD_EXT=1 asks for what cannot be had."""
    choice = os.environ.get("XECO_BUILD_EXT", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"XECO_BUILD_EXT: expected 0 or 1, found {choice!r}")
    missing = missing_tools()
    if choice == "1" and missing:
        sys.exit(f"XECO_BUILD_EXT=1 asks for the extension, but {missing}")
    if choice == "" and missing:
        print(f"xeco-convert: built without the extension, since {missing}; it will run in plain torch")
    return choice != "0" and missing is None


def missing_tools() -> str | None:
    """What keeps the extension from being built, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux alone so far (this is {sys.platform})"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment"
    return None


def extension():
    """The module xeco_convert._C."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    sources, headers = (
        sorted(str(file.relative_to(HERE)) for file in HERE.glob(f"csrc/**/*{suffix}")) for suffix in (".cpp", ".h")
    )
    version = re.search(r'__version__ = "([^"]+)"', (HERE / "xeco_convert/__init__.py").read_text("utf-8")).group(1)
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("XECO_VERSION", f'"{version}"'),
        ("XECO_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
    ]
    if platform.machine() in ("x86_64", "AMD64"):
        macros.append(("XECO_X86_KERNELS", None))
    if os.environ.get("XECO_EMULATE_AMX") == "1":
        macros.append(("XECO_EMULATE_AMX", None))
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    # vector arguments are passed inside one file only; GCC 12's own AVX-512 headers trip the other two
    flags += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return CppExtension(
        name="xeco_convert._C",
        sources=sources,
        # setuptools asks ninja only where one of these is newer than the module
        depends=[*headers, "setup.py", "xeco_convert/__init__.py"],
        include_dirs=[str(HERE / "csrc"), str(HERE / "csrc/include")],
        define_macros=macros,
        extra_compile_args={"cxx": flags + shlex.split(os.environ.get("XECO_CXXFLAGS", ""))},
        extra_link_args=shlex.split(os.environ.get("XECO_LDFLAGS", "")),
    )


if wanted():
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
else:
    setup()

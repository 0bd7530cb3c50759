"""Builds the extension, and nothing else; everything about the package is in pyproject.toml.

XECO_BUILD_EXT=0 leaves the extension out, =1 demands it. Unset: it is built where torch and a C++ compiler are at hand, and
left out with a line that says so where they are not (the package then runs in plain torch).
The GPU kernels are built with it where torch has CUDA or ROCm, as a second module that is imported there: by nvcc of CUDA_HOME
for TORCH_CUDA_ARCH_LIST, or by hipcc of ROCM_HOME for PYTORCH_ROCM_ARCH. Where that fails, a line says so and the rest stands.
XECO_BUILD_DEVICE=0 leaves them out, =1 demands them.
XECO_EMULATE_AMX=1 and XECO_CXXFLAGS are for tests and sanitizers: csrc/README.md.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# 2.10: the oldest torch whose stable ABI has all that is used; the binary runs on that and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"
DEVICE_NAME = "xeco_convert._device"
INCLUDE_DIRS = [str(HERE / "csrc"), str(HERE / "csrc/include")]


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


def device_wanted() -> bool:
    """Whether to build the GPU kernels. Exits with a sentence where XECO_BUILD_DEVICE=1 asks for what cannot be had."""
    import torch

    choice = os.environ.get("XECO_BUILD_DEVICE", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"XECO_BUILD_DEVICE: expected 0 or 1, found {choice!r}")
    if choice == "0":
        return False
    missing = missing_device_tools()
    if choice == "1" and missing:
        sys.exit(f"XECO_BUILD_DEVICE=1 asks for the GPU kernels, but {missing}")
    if missing and (torch.version.cuda or torch.version.hip):
        print(f"xeco-convert: built without the GPU kernels, since {missing}; on a GPU it will run in plain torch")
    return missing is None


def missing_device_tools() -> str | None:
    """What keeps the GPU kernels from being built, or None."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.hip is not None:
        return None if cpp_extension.ROCM_HOME else "ROCM_HOME names no ROCm"
    if torch.version.cuda is None:
        return "this torch has neither CUDA nor ROCm"
    if not cpp_extension.CUDA_HOME:
        return "CUDA_HOME names no CUDA toolkit (nvcc)"
    nvcc = cuda_of_nvcc(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    if nvcc is None or nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        complaint = f"is of CUDA {nvcc}" if nvcc else "does not run"
        return f"torch is of CUDA {torch.version.cuda}, and nvcc of CUDA_HOME ({cpp_extension.CUDA_HOME}) {complaint}"
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    capabilities = [torch.cuda.get_device_capability(device) for device in devices]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and capabilities and max(capabilities) < (8, 0):
        return "they need a GPU of compute capability 8.0 or later (TORCH_CUDA_ARCH_LIST builds for another machine)"
    return None


def cuda_of_nvcc(nvcc: Path) -> str | None:
    """The version of CUDA that a compiler belongs to, such as "13.0"; None where it does not run."""
    try:
        words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+\.\d+)", words)
    return release.group(1) if release else None


def files(*suffixes: str) -> list[str]:
    """All of csrc/ with one of these endings."""
    return sorted(str(file.relative_to(HERE)) for suffix in suffixes for file in HERE.glob(f"csrc/**/*{suffix}"))


def common_macros() -> list[tuple[str, str | None]]:
    """What both modules are told."""
    import torch

    version = re.search(r'__version__ = "([^"]+)"', (HERE / "xeco_convert/__init__.py").read_text("utf-8")).group(1)
    return [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("XECO_VERSION", f'"{version}"'),
        ("XECO_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
    ]


def device_extension():
    """The module xeco_convert._device: kernels in .cu files, registered with torch through its stable ABI."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    is_rocm = torch.version.hip is not None
    archs = "PYTORCH_ROCM_ARCH" if is_rocm else "TORCH_CUDA_ARCH_LIST"
    if not torch.cuda.is_available():  # nobody to ask: the kernels' own targets, PTX for what comes later
        os.environ.setdefault(archs, "gfx90a;gfx942" if is_rocm else "8.0;9.0+PTX")
    macros = [
        *common_macros(),
        ("USE_CUDA", None),  # declares what torch's C shim has for the current stream, under ROCm too
        ("XECO_DEVICE_LIBRARY", None),
        ("XECO_DEVICE_BACKEND", '"rocm"' if is_rocm else '"cuda"'),
        ("XECO_DEVICE_ARCHS", f'"{os.environ.get(archs, "")}"'),
    ]
    host = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"]
    device = ["-O3", "-std=c++17"] + ([] if is_rocm else ["-Xcompiler", "-fvisibility=hidden"])
    return CUDAExtension(
        name=DEVICE_NAME,
        # module.cc: the suffix keeps it out of xeco_convert._C, which takes every .cpp
        sources=[*files(".cu"), "csrc/device/module.cc"],
        depends=[*files(".cuh", ".h"), "setup.py", "xeco_convert/__init__.py"],
        include_dirs=INCLUDE_DIRS,
        define_macros=macros,
        extra_compile_args={"cxx": host, "nvcc": device + shlex.split(os.environ.get("XECO_NVCCFLAGS", ""))},
    )


def extension():
    """The module xeco_convert._C."""
    from torch.utils.cpp_extension import CppExtension

    macros = common_macros()
    if platform.machine() in ("x86_64", "AMD64"):
        macros.append(("XECO_X86_KERNELS", None))
    if os.environ.get("XECO_EMULATE_AMX") == "1":
        macros.append(("XECO_EMULATE_AMX", None))
    # -Wno-psabi: vector arguments are passed inside one file only
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    return CppExtension(
        name="xeco_convert._C",
        sources=files(".cpp"),
        # setuptools asks ninja only where one of these is newer than the module
        depends=[*files(".h"), "setup.py", "xeco_convert/__init__.py"],
        include_dirs=INCLUDE_DIRS,
        define_macros=macros,
        extra_compile_args={"cxx": flags + shlex.split(os.environ.get("XECO_CXXFLAGS", ""))},
        extra_link_args=shlex.split(os.environ.get("XECO_LDFLAGS", "")),
    )


def build_in_two_steps():
    """The command build_ext: the CPU's module first, so that whatever keeps the GPU's from being built leaves it alone."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            device = [module for module in self.extensions if module.name == DEVICE_NAME]
            self.extensions = [module for module in self.extensions if module.name != DEVICE_NAME]
            settings = dict(vars(self.compiler))
            super().build_extensions()
            if not device:
                return
            # torch puts its own methods in place of the compiler's, each time
            vars(self.compiler).clear()
            vars(self.compiler).update(settings)
            others, self.extensions = self.extensions, device
            try:
                super().build_extensions()
                others = [*others, *device]
            except Exception as error:  # a compiler, a linker, torch's checks of both
                if os.environ.get("XECO_BUILD_DEVICE") == "1":
                    raise
                print(f"xeco-convert: built without the GPU kernels, since that failed: {error}")
                print("xeco-convert: XECO_BUILD_DEVICE=0 leaves them out")
            finally:
                self.extensions = others

    return Build


if wanted():
    modules = [extension(), *([device_extension()] if device_wanted() else [])]
    setup(ext_modules=modules, cmdclass={"build_ext": build_in_two_steps()})
else:
    setup()

"""The compiled kernels: imported once, on first use, and never needed.

`xeco_convert._C` has the kernels of the CPU and is imported on first use; `xeco_convert._device` has those of a GPU and is
imported with the ops, where it was built and torch has that backend.
XECO_EXTENSION=path loads another build of the module (a sanitizer's, for one); XECO_CPU_LEVEL caps the instruction set.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from types import ModuleType

import torch

from xeco_convert.errors import XecoError

NAME = "xeco_convert._C"
# as csrc/include/xeco/dispatch.h lists them: needed where the extension is missing, and compared with it by tests/csrc/
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE_NAME = "xeco_convert._device"
DEVICE_DTYPES = (torch.bfloat16, torch.float16)
_KEPT_OUT = "attention runs in plain torch: slower, same results"


class ExtensionError(XecoError, ImportError):
    """A build of the extension, or a level of it, that was asked for by name and cannot be had."""


class _State:
    """What the first attempt to import has left: whether it was made, and what came of it."""

    tried = False
    module: ModuleType | None = None


def extension() -> ModuleType | None:
    """The module `xeco_convert._C`, whose import registers its kernels; None, after one warning, where it is missing.

    Raises `ExtensionError` where XECO_EXTENSION or XECO_CPU_LEVEL names what is not there.
    """
    if not _State.tried:
        _State.module = _import()
        _State.tried = True
    return _State.module


def first_loaded_for(tensor: torch.Tensor) -> bool:
    """Whether this very call imported the extension, which it does for tensors that its kernels take: the ops' plain kernels
    ask, and then call the op once more."""
    is_served = tensor.device.type == "cpu" and tensor.dtype != torch.float64
    return is_served and not _State.tried and extension() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernel_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why no compiled kernel serves tensors of this device ("cpu", "cuda") and dtype, in words; None where one does.

    Loads the extension if it is the one thing that is left to know.
    """
    if device_type == "cuda":
        return _device_obstacle(dtype)
    if device_type != "cpu":
        return f"there are no compiled kernels for {device_type} tensors"
    if dtype not in CPU_DTYPES:
        return f"the compiled kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if extension() is None:
        return "the extension xeco_convert._C is not there"
    return None


def takes_codes(device_type: str, requested: str | None) -> bool:
    """Whether the kernels of a device pack rows into codes, and read these as they lie, where XECO_ATTENTION names `requested`;
    elsewhere plain torch packs and widens them."""
    # Their present form has run on emulated GPUs, on no real one: nobody shall be the first without knowing.
    return device_type == "cpu" or (device_type == "cuda" and requested == "fused")


def runs_in_reference(tensor: torch.Tensor) -> bool:
    """Whether attention on such tensors is the reference's from the start, since the kernels that are registered for their
    device refuse the dtype: float64 everywhere, float32 on a GPU that has compiled kernels."""
    return tensor.dtype == torch.float64 or (tensor.is_cuda and _DEVICE is not None and tensor.dtype == torch.float32)


def _device_obstacle(dtype: torch.dtype) -> str | None:
    if _DEVICE is None:
        return f"the GPU kernels {DEVICE_NAME} are not there"
    if dtype not in DEVICE_DTYPES:
        return f"the GPU kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _import_device() -> ModuleType | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return None  # the library needs torch's own of that backend
    if importlib.util.find_spec(DEVICE_NAME) is None:
        return None
    try:
        return _checked(importlib.import_module(DEVICE_NAME))
    except ExtensionError:
        raise
    except ImportError as error:  # built for another torch or another driver
        warnings.warn(
            f"{DEVICE_NAME} does not load with torch {torch.__version__} ({error}); {_KEPT_OUT}", stacklevel=2
        )
        return None


def _import() -> ModuleType | None:
    level, path = os.environ.get("XECO_CPU_LEVEL"), os.environ.get("XECO_EXTENSION")
    if level and level not in CPU_LEVELS:
        raise ExtensionError(f"XECO_CPU_LEVEL: expected one of {', '.join(CPU_LEVELS)}, found '{level}'")
    if path:
        return _checked(_from_file(path))
    if importlib.util.find_spec(NAME) is None:
        warnings.warn(
            f"xeco_convert was installed without its extension; {_KEPT_OUT}. To build it: a C++ compiler, then "
            "XECO_BUILD_EXT=1 pip install xeco-convert --no-binary xeco-convert",
            stacklevel=2,
        )
        return None
    try:
        return _checked(importlib.import_module(NAME))
    except ExtensionError:
        raise
    except ImportError as error:  # a torch older than the build's target, or another machine's file
        warnings.warn(
            f"xeco_convert._C does not load with torch {torch.__version__} ({error}); {_KEPT_OUT}", stacklevel=2
        )
        return None


def _from_file(path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise ExtensionError(f"XECO_EXTENSION: '{path}' could not be loaded as {NAME}: {error}") from error
    sys.modules[NAME] = module
    return module


def _checked(module: ModuleType) -> ModuleType:
    from xeco_convert import __version__

    if module.version != __version__:
        raise ExtensionError(
            f"xeco_convert is version {__version__}, but its extension {module.__file__} was built from {module.version}; "
            "build it again: pip install --no-build-isolation --editable ."
        )
    return module


# At import, not on first use: the dispatcher must know these kernels before it looks for one. It touches no GPU.
_DEVICE = _import_device()

"""Memory of this process: how much it takes, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

# mallopt's names (malloc.h of glibc), and what commands set: tensors up to the first, and so much free memory in all, stay.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 32 << 20, 256 << 20  # bytes
_MOST_GROWTH = 64 << 20  # bytes beyond the first look


def peak_bytes() -> int:
    """Peak resident memory; 0 where the system does not tell. getrusage also counts the process that started this one, where
    Linux tells more."""
    held = _status("VmHWM")
    if held is not None:
        return held
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let memory of a tensor that is gone serve the next one, where malloc is glibc's.

    By default what is larger than a megabyte or so goes back to the system and comes again page by page, which was a tenth of
    the time of a conversion. MALLOC_* and GLIBC_TUNABLES of the environment stay the user's.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


class FreedMemory:
    """Gives freed pages back to the system where they add up, beginning with those that there are.

    The C library keeps them between what lives on, and with the depth of a model they become more than its work takes
    (benchmarks/bench_calibrated.py --part memory). Giving them back at every layer makes each layer take all of its memory anew.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        _give_back()

    def look(self) -> None:
        """To be called where as much is in use as at every other call."""
        held = _status("VmRSS")
        if held is None:
            return
        if self._first is None:
            self._first = held
        elif held > self._first + _MOST_GROWTH:
            _give_back()


def _give_back() -> None:
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Callable[..., int] | None:
    """A function of the C library on Linux, where it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None where the system has none."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None

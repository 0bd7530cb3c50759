"""Every kernel that this machine can run: each instruction set of the extension, on one and on two threads.

Without the extension the same tests run on the plain kernels ("reference").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from xeco_convert.ops.extension import CPU_LEVELS, extension


def available_levels() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the one warning where the extension is missing
        module = extension()
    if module is None:
        return ["reference"]
    highest = CPU_LEVELS.index(module.detected_level)
    return [level for level in module.compiled_levels if CPU_LEVELS.index(level) <= highest]


LEVELS = available_levels()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, in force during the test."""
    module = extension()
    if module is None:
        yield request.param
        return
    before = module.cpu_level()
    module.set_cpu_level(request.param)
    yield request.param
    module.set_cpu_level(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

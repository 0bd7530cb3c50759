"""Every kernel that this machine can run: each instruction set of the extension, on one and on two threads, and its GPU.

Without the extension the same tests run on the plain kernels ("reference").
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from elsewhere import Elsewhere
from levels import LEVELS

from xeco_convert.ops.extension import CPU_LEVELS, DEVICE_DTYPES, extension

OPS = ("latent_attention", "latent_attention_decode", "rope_and_append")


def marked(level: str) -> object:
    return pytest.param(level, marks=pytest.mark.gpu) if level == "cuda" else level


@pytest.fixture(params=map(marked, LEVELS))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, in force during the test; then the GPU, where the tested functions run instead."""
    module = extension()
    if request.param == "cuda":
        for name in OPS:
            if hasattr(request.module, name):
                monkeypatch.setattr(request.module, name, getattr(Elsewhere(device="cuda"), name))
    if module is None or request.param not in CPU_LEVELS:
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the GPU's tests those go that would show nothing there: a second number of threads, and what plain torch computes."""
    kept = [item for item in items if _shows_something(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _shows_something(item)])
    items[:] = kept


def _shows_something(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if parameters.get("level") != "cuda":
        return True
    if item.get_closest_marker("on_host") or parameters.get("threads") == 2:
        return False
    return "rope_and_append" in item.nodeid or parameters.get("dtype", DEVICE_DTYPES[0]) in DEVICE_DTYPES

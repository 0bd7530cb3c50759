"""Every kernel that this machine can run: each instruction set of the extension, on one and on two threads, and its GPU.

The full product of sizes, dtypes, options and numbers of threads runs on the best instruction set; on each of the others, as
many of its rows as have every pair of values (pairs.py), and so every size, dtype and option. XECO_TEST_EVERY_LEVEL=1 runs
the product on all of them. Without the extension the same tests run on the plain kernels ("reference").
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
import torch
from elsewhere import Elsewhere
from levels import BEST_LEVEL, LEVELS
from pairs import pairwise

from xeco_convert.ops.extension import CPU_LEVELS, DEVICE_DTYPES, extension

OPS = ("latent_attention", "latent_attention_decode", "latent_attention_packed", "rope_and_append")


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
    """Leaves out tests of the GPU that would show nothing there, and of the lesser instruction sets those that repeat pairs."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    left_out = {id(item) for item in own if not _shows_something(item)}
    if os.environ.get("XECO_TEST_EVERY_LEVEL") != "1":
        left_out |= {id(item) for item in own} - {id(item) for item in _with_every_pair(own)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _shows_something(item: pytest.Item) -> bool:
    """On the GPU not: a second number of threads, and what plain torch computes."""
    parameters = _parameters(item)
    if parameters.get("level") != "cuda":
        return True
    if item.get_closest_marker("on_host") or parameters.get("threads") == 2:
        return False
    return "rope_and_append" in item.nodeid or parameters.get("dtype", DEVICE_DTYPES[0]) in DEVICE_DTYPES


def _with_every_pair(items: list[pytest.Item]) -> list[pytest.Item]:
    """All items, but of each test function on a lesser instruction set as many as have every pair of its parameters."""
    chosen, products = [], defaultdict(list)
    for item in items:
        level = _parameters(item).get("level", BEST_LEVEL)
        if level in (BEST_LEVEL, "cuda"):
            chosen.append(item)
        else:
            products[item.nodeid.partition("[")[0], level].append(item)
    for product in products.values():
        chosen += [product[number] for number in pairwise([_row(item) for item in product])]
    return chosen


def _row(item: pytest.Item) -> dict[str, Hashable]:
    """The parameters besides the level, each value by its identity: it need not be hashable, and is one object in all rows."""
    return {name: id(value) for name, value in _parameters(item).items() if name != "level"}

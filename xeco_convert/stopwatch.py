"""How long the parts of a long work take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Each = TypeVar("Each")
Timings = dict[str, dict[str, float]]


class Stopwatch:
    """Seconds, and seconds of this process's CPUs, of the parts of a work by their names, in the order in which they began.

    A part may come again, and is added up. What a GPU still has to do when a part ends counts in the part that waits for it.
    """

    def __init__(self) -> None:
        self._parts: Timings = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside, and leaves it out of the part around it."""
        outer, self._parts = self._parts, {name: {"seconds": 0.0, "cpu_seconds": 0.0}}
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            inner, self._parts = self._parts, outer
            own = inner.pop(name)
            own["seconds"] += time.monotonic() - wall - sum(part["seconds"] for part in inner.values())
            own["cpu_seconds"] += time.process_time() - cpu - sum(part["cpu_seconds"] for part in inner.values())
            for part, times in {name: own, **inner}.items():
                total = self._parts.setdefault(part, {"seconds": 0.0, "cpu_seconds": 0.0})
                for kind, value in times.items():
                    total[kind] += value

    def each(self, name: str, items: Iterable[Each]) -> Iterator[Each]:
        """The items; making each of them is a part."""
        iterator, end = iter(items), object()
        while True:
            with self.part(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def timings(self) -> Timings:
        """{name: {"seconds": s, "cpu_seconds": s}} so far."""
        return {name: dict(times) for name, times in self._parts.items()}

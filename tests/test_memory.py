"""What this process keeps of freed memory: growth goes back to the system, what every layer takes again does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from xeco_convert import memory
from xeco_convert.memory import FreedMemory, peak_bytes


def test_what_there_is_and_growth_beyond_the_first_look_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    held = {"VmRSS": 500 << 20}
    monkeypatch.setattr(memory, "_status", held.get)
    monkeypatch.setattr(memory, "_of_c_library", lambda name: trimmed.append if name == "malloc_trim" else None)
    freed = FreedMemory()
    for megabytes, times in ((500, 1), (560, 1), (564, 1), (565, 2), (540, 2), (900, 3)):
        held["VmRSS"] = megabytes << 20
        freed.look()
        assert len(trimmed) == times, megabytes


def test_a_system_that_does_not_tell_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_status", lambda name: None)
    freed = FreedMemory()
    monkeypatch.setattr(memory, "_of_c_library", lambda name: pytest.fail("nothing is known to have grown"))
    freed.look()
    assert peak_bytes() > 0  # by getrusage


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no Linux")
def test_the_peak_is_what_was_held_at_most() -> None:
    held = memory._status("VmRSS")
    assert held is not None and peak_bytes() >= held
    block = b"x" * (128 << 20)  # not zeros, which no page is taken for
    assert held + 0.9 * len(block) <= peak_bytes() < 1 << 40

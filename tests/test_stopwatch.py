"""The parts of a work add up to the whole, each counted once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import xeco_convert
from xeco_convert import stopwatch
from xeco_convert.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the test sets; the process is busy half of them."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: now[0] / 2)
    return now


def test_an_inner_part_counts_in_itself_alone(clock: list[float]) -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("outer"):
            clock[0] += 1
            with watch.part("inner"):
                clock[0] += 10
            clock[0] += 2
    with watch.part("inner"):
        clock[0] += 5
    assert watch.timings() == {
        "outer": {"seconds": 6.0, "cpu_seconds": 3.0},
        "inner": {"seconds": 25.0, "cpu_seconds": 12.5},
    }


def test_items_are_timed_as_they_are_made(clock: list[float]) -> None:
    def made() -> Any:
        for number in range(3):
            clock[0] += 1
            yield number

    watch = Stopwatch()
    for _ in watch.each("making", made()):
        clock[0] += 100
    assert watch.timings() == {"making": {"seconds": 3.0, "cpu_seconds": 1.5}}


def test_a_part_that_fails_is_counted(clock: list[float]) -> None:
    def fail() -> None:
        clock[0] += 4
        raise ValueError("broken")

    watch = Stopwatch()
    with pytest.raises(ValueError, match="broken"), watch.part("broken"):
        fail()
    assert watch.timings()["broken"]["seconds"] == 4.0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rank": 12, "rope_dim": 4, "refine": True, "refine_steps": 2}, {"refinement"}),
        ({"kv_size": "50%"}, {"survey"}),
    ],
)
def test_a_conversion_says_what_took_its_time(
    options: dict[str, Any], parts: set[str], llama: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    report = xeco_convert.convert(llama, tmp_path / "out", calibration_tokens=512, **options)
    assert set(report.timings) == parts | {
        "calibration text",
        "source",
        "closed form",
        "refit",
        "measuring",
        "converted model",
    }
    times = [part["seconds"] for part in report.timings.values()]
    assert all(seconds >= 0 for seconds in times) and 0 < sum(times) <= time.monotonic() - began
    assert "timings" not in report.reproducible()

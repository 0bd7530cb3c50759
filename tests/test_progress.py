"""Progress as plain lines: when a line is said, what it says of the time left, and that nothing but lines reaches a file."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.calibration.sampling import sample_rows
from xeco_convert.commandline import progress as module
from xeco_convert.commandline.progress import ProgressLines, progress


class Told:
    """Lines and a clock that goes only when it is told to."""

    def __init__(self, *, by_stage: bool = False) -> None:
        self.now, self.said = 100.0, list[str]()
        self.lines = ProgressLines(self.said.append, by_stage=by_stage, clock=lambda: self.now)

    def after(self, seconds: float, what: str, share: float, figures: Mapping[str, float] | None = None) -> list[str]:
        """The lines that this report brings."""
        before = len(self.said)
        self.now += seconds
        self.lines.report(what, share, figures or {})
        return self.said[before:]


def test_the_first_report_the_tenths_and_the_last_are_said() -> None:
    told = Told()
    for second in range(1001):
        told.after(0 if second == 0 else 2, f"step {second}", second / 1000)
    assert 2000 // 30 < len(told.said) <= 2000 // 30 + 11
    assert {f"{share}%" for share in range(0, 101, 10)} <= {line.split()[1] for line in told.said}
    assert told.said[0] == "0:00:00    0%  ETA       -  step 0"
    assert told.said[-1] == "0:33:20  100%  ETA 0:00:00  step 1000"
    assert told.after(0, "written", 1.0) == []


def test_a_short_run_has_a_line_for_each_tenth_but_none_twice_in_a_second() -> None:
    told = Told()
    for step in range(101):
        told.after(0.2, f"step {step}", step / 100)
    assert [line.split()[1] for line in told.said] == [f"{share}%" for share in range(0, 101, 10)]
    hasty = Told()
    for step in range(101):
        hasty.after(0.001, f"step {step}", step / 100)
    assert [line.split()[1] for line in hasty.said] == ["0%", "100%"]


def test_no_half_minute_without_a_line() -> None:
    told = Told()
    told.after(0, "layer 1 of 80", 0.0)
    told.after(29, "layer 1 of 80", 0.001)
    assert len(told.said) == 1
    assert told.after(1, "layer 1 of 80", 0.002) == ["0:00:30    0%  ETA 4:09:30  layer 1 of 80"]
    told.now += 29
    told.lines.remind()
    assert len(told.said) == 2
    told.now += 3631
    told.lines.remind()  # no report for an hour: what is known is said again
    assert told.said[-1].startswith("1:01:30    0%  ETA ") and told.said[-1].endswith("layer 1 of 80")


def test_nothing_is_said_before_the_first_report_and_after_the_last() -> None:
    told = Told()
    told.now += 60
    told.lines.remind()
    assert told.said == []
    told.after(0, "written", 1.0)
    told.now += 60
    told.lines.remind()
    assert len(told.said) == 1


def test_the_time_left_goes_by_what_this_run_did() -> None:
    """A run that goes on at 60 % did not do these 60 % in no time."""
    told = Told()
    told.after(5, "layer 7 of 10", 0.6)
    assert told.after(40, "layer 8 of 10", 0.7) == ["0:00:45   70%  ETA 0:02:00  layer 8 of 10"]


def test_every_stage_has_its_own_share_and_time() -> None:
    told = Told(by_stage=True)
    assert told.after(0, "sampling text", 0.0) == ["0:00:00    0%  ETA       -  sampling text"]
    assert told.after(60, "sampling text", 1.0) == ["0:01:00  100%  ETA 0:00:00  sampling text"]
    assert told.after(0.1, "kl", 0.0) == ["0:01:00    0%  ETA       -  kl"]
    assert told.after(100, "kl", 0.25, {"loss": 2.34567, "lr": 1e-4}) == [
        "0:02:40   25%  ETA 0:05:00  kl  loss 2.346  lr 0.0001"
    ]
    assert told.after(0.1, "measuring after", 1.0) == ["0:02:40  100%  ETA 0:00:00  measuring after"]


def test_a_reader_that_is_gone_does_not_end_the_run() -> None:
    def say(line: str) -> None:
        raise BrokenPipeError

    lines = ProgressLines(say)
    lines.report("layer 1 of 2", 0.0)
    lines.report("layer 2 of 2", 1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("by_stage", [False, True])
def test_a_terminal_gets_a_bar_and_anything_else_lines(by_stage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, stream, term in (
        ("bar", Terminal(), "xterm"),
        ("dumb", Terminal(), "dumb"),
        ("file", io.StringIO(), "xterm"),
    ):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(sys, "stderr", stream)
        with progress(False, by_stage=by_stage) as report:
            assert report is not None
            report("layer 1 of 2", 0.0, {})
            report("written", 1.0)
        found[name] = stream.getvalue()
    assert "━" in found["bar"] and "written" in found["bar"]
    for name in ("dumb", "file"):
        assert [line.split("  ")[-1] for line in found[name].splitlines()] == ["layer 1 of 2", "written"]
        assert "\r" not in found[name] and "\x1b" not in found[name]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(True) as report:
        assert report is None
    assert capsys.readouterr() == ("", "")


class Heard(io.StringIO):
    """Waits for a second line."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.getvalue().count("\n") >= 2:
            self.twice.set()
        return count


def test_a_silent_step_is_told_of_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Heard()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "_MOST_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.001)
    with progress(False) as report:
        assert report is not None
        report("a long step", 0.0)
        assert stream.twice.wait(30)
    assert stream.getvalue().count("a long step") >= 2


OPTIONS = {
    "sampled": {"rank": 8},
    "by size": {"kv_size": "50%"},
    "by energy": {"energy": 0.9},
    "refined": {"rank": 8, "refine": True, "refine_steps": 3},
    "by size, refined": {"kv_size": "50%", "refine": True, "refine_steps": 5},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_long_part_of_a_conversion_reports(case: str, llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, float]] = []
    xeco_convert.convert(
        llama,
        tmp_path / "out",
        **OPTIONS[case],
        calibration_tokens=1024,
        on_progress=lambda what, share: calls.append((what, share)),
    )
    shares = [share for _, share in calls]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    words = [what for what, _ in calls]
    assert words.count("sampling calibration text") > 20  # a report for each token
    parts = ["layer 1 of 3", "layer 3 of 3", "measuring", "writing model.norm.weight", "written"]
    if "by size" in case:
        parts = ["survey of layer 1 of 3", "survey of layer 3 of 3", *parts]
    places = [words.index(part) for part in parts]
    assert places == sorted(places)
    assert words.count("layer 2 of 3") > (3 if "refined" in case else 0)


def test_counting_tokens_changes_none(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    shares: list[float] = []
    plain, counted = (sample_rows(model, 5, 12, 3, 2, told) for told in (None, shares.append))
    assert torch.equal(plain[0], counted[0]) and torch.equal(plain[1], counted[1])
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 3 * 12

"""bench_calibrated runs the installed command at two depths, and its claims pass and fail at their limits."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_calibrated
import pytest
from bench_calibrated import SMOLLM_135M, MemoryRow, TimedCase, TimedRow, memory_rows, memory_table, time_cases
from bench_convert import CommandRun

from xeco_convert.cli import convert_command

TINY: dict[str, Any] = SMOLLM_135M | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(rss: int) -> CommandRun:
    return CommandRun(exit_code=0, wall_seconds=1.0, cpu_seconds=1.0, peak_rss_bytes=rss)


def in_this_process(command: Sequence[str], threads: int) -> CommandRun:
    """Runs what `run_measured` would start (test_a_timed_case_is_run_as_a_user_does does), which imports nothing again."""
    assert Path(command[0]).is_file()
    convert_command.main(args=list(command[1:]), prog_name="xeco-convert", standalone_mode=False)
    return run(2**27 + threads)


@pytest.mark.slow
def test_the_command_is_measured_at_both_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_calibrated, "run_measured", in_this_process)
    options = argparse.Namespace(threads=1, memory_tokens=1024)
    rows = memory_rows(tmp_path, TINY, options)
    assert [row.name for row in rows] == ["default", "--refine"]
    assert all(row.layers == (1, 3) and row.deep.peak_rss_bytes > 2**26 for row in rows)
    assert "0.9" in memory_table(rows) or "1.0" in memory_table(rows)
    assert not (tmp_path / "converted").exists()


@pytest.mark.slow
def test_a_timed_case_is_run_as_a_user_does(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = TimedCase(name="ranks", arguments=("--init", "paper", "--rank", "8"), limit=600.0)
    monkeypatch.setattr(bench_calibrated, "timed_cases", lambda text: (case,))
    (row,) = time_cases(llama, tmp_path / "no text", tmp_path, argparse.Namespace(runs=1, threads=1))
    assert row.holds and row.cpu_seconds > 0 and row.peak_rss_bytes > 2**26
    assert "ranks" in capsys.readouterr().err


def test_claims_pass_and_fail_at_their_limits() -> None:
    case = TimedCase(name="a", arguments=(), limit=60.0)
    row = TimedRow(case=case, wall_seconds=60.0, cpu_seconds=100.0, peak_rss_bytes=1)
    assert row.holds and not dataclasses.replace(row, wall_seconds=60.1).holds
    grown = MemoryRow(name="a", layers=(1, 3), shallow=run(100), deep=run(110))
    assert grown.holds and not dataclasses.replace(grown, deep=run(111)).holds


def test_the_limits_are_those_that_were_promised() -> None:
    assert {case.limit for case in bench_calibrated.timed_cases(Path("t")) if "--refine" not in case.arguments} == {
        60.0
    }
    assert {case.limit for case in bench_calibrated.timed_cases(Path("t")) if "--refine" in case.arguments} == {300.0}

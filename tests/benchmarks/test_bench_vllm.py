"""bench_vllm sets the converted folder beside its source, and takes the median of its rounds."""

import sys
from pathlib import Path
from typing import Any

import bench_vllm
import pytest


def result(tokens: float, decode: float) -> dict[str, Any]:
    return {"tokens_per_gib": tokens, "contexts": {"512": {"prefill": 100.0, "decode": decode}}}


def test_medians_of_the_rounds_count_and_ratios_are_of_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    decoded = {"in": iter([10.0, 90.0, 20.0]), "out": iter([30.0, 25.0, 1.0])}
    served = []

    def in_process(settings: dict[str, Any]) -> dict[str, Any]:
        served.append(settings["folder"])
        folder = settings["folder"]
        return result({"in": 1000.0, "out": 4000.0}[folder], next(decoded[folder]))

    monkeypatch.setattr(bench_vllm, "in_process", in_process)
    monkeypatch.setattr(
        sys, "argv", ["bench_vllm.py", "--source", "in", "--converted", "out", "--json", str(tmp_path / "x.json")]
    )
    bench_vllm.main()
    assert served == ["in", "out"] * 3
    printed = capsys.readouterr().out
    assert "1,000 source, 4,000 converted (4.00 times)" in printed
    assert [cell.strip() for cell in printed.splitlines()[4].split("|")[1:-1]] == [
        "",
        "converted",
        "25",
        "1.25",
        "100",
        "1",
    ]
    assert (tmp_path / "x.json").is_file()


def test_both_folders_are_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_vllm.py", "--source", "in"])
    with pytest.raises(SystemExit):
        bench_vllm.main()
    assert "--source and --converted: expected two folders" in capsys.readouterr().err

"""bench_codes fails where the kernel over codes is slower than it must be, and measures what the files say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bench_codes
import pytest
import torch
from builders import VOCABULARY


def test_a_slow_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_codes.py", "--part", "decode"])
    for fast in (1.31, 1.29):
        monkeypatch.setattr(
            bench_codes, "decode", lambda repeats, fast=fast: [[1, 32768, "4 + 8", 2.0, 2.0 / fast, fast]]
        )
        if fast > 1.3:
            bench_codes.main()
        else:
            with pytest.raises(SystemExit, match="below its bound"):
                bench_codes.main()
    assert "32768" in capsys.readouterr().out


def test_quality_is_that_of_the_bits_asked_for(llama: Path, tmp_path: Path) -> None:
    words = torch.randint(3, VOCABULARY, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    arguments = argparse.Namespace(
        checkpoint=llama, text=text, calibration=text, calibration_tokens=1024, window=32, num_windows=4
    )
    arguments.kv_sizes, arguments.bits = "30%,6%", "16,4"
    wide, narrow, small, least = bench_codes.quality(arguments)
    assert "16 + 16" in wide[3] and "4 + " in narrow[3] and float(narrow[5]) < float(wide[5])
    assert small[3] == "cannot be met" and least[:2] == ["6%", "4"]

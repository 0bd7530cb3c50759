"""bench_qk_norm trains twins that differ in the norm alone, and measures each form of the keys."""

import json
import sys
from pathlib import Path

import bench_qk_norm
import pytest


@pytest.mark.slow
def test_twins_are_trained_and_measured_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_qk_norm, "_WIDTHS", ((64, 32),))
    monkeypatch.setattr(bench_qk_norm, "_MEASURED_TOKENS", 2048)
    monkeypatch.setattr(bench_qk_norm, "_CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(bench_qk_norm.train, "NUM_STORIES", 400)
    folder, output = tmp_path / "twins", tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "train", str(folder), "--steps", "2", "--rehearsal", "1"])
    bench_qk_norm.main()
    monkeypatch.setattr(sys, "argv", ["bench", "measure", str(folder), "--json", str(output)])
    bench_qk_norm.main()
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["keys"]) for row in rows] == [
        ("llama", "none"),
        ("qwen3", "exact"),
        ("qwen3", "regression"),
    ]
    assert all(0.24 < row["kv_share"] < 0.26 and row["kl"] > 0 for row in rows)
    assert "norm of keys" in capsys.readouterr().out

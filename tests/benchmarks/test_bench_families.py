"""bench_families measures a family's exactness, errors and key regression, and prints both tables."""

import json
import sys
from pathlib import Path

import bench_families
import pytest


@pytest.mark.slow
def test_a_family_with_normalised_keys_has_a_row_for_each_form_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "families.json"
    monkeypatch.setattr(sys, "argv", ["bench_families.py", "--families", "qwen3", "--json", str(output)])
    bench_families.main()
    printed = capsys.readouterr().out
    assert "normalised keys" in printed and printed.count("qwen3, regression |") == 2 and printed.count("qwen3 |") == 1
    exact, regressed = json.loads(output.read_text(encoding="utf-8"))["families"]
    pairs = list(zip(regressed["key_regression"], regressed["key_scaling"], strict=True))
    assert len(pairs) == 3 and all(0 < error < scale for error, scale in pairs)
    assert exact["key_regression"] == [None] * 3
    for row in (exact, regressed):
        assert 0 < row["exactness"] < 1e-5
        assert 0 < row["error_50%"] < row["error_25%"] and 0 < row["kl_50%"] < row["kl_25%"]

"""bench_hqq compares at equal bytes, and its exit code tells which is better."""

import json
from pathlib import Path

import bench_hqq
import pytest
import torch


@pytest.fixture
def arguments(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 50 + 3}" for number in range(3000)), encoding="utf-8")
    options = ["bench_hqq.py", "--checkpoint", str(llama), "--text", str(text), "--calibration", str(text)]
    options += ["--calibration-tokens", "1024", "--window", "16", "--num-windows", "3"]
    return [*options, "--json", str(tmp_path / "hqq.json")]


@pytest.mark.parametrize(("most", "code"), [(0.001, 1), (0.8, 0)])
def test_a_codec_is_compared_at_equal_bytes(
    arguments: list[str], most: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HQQ's place is taken by rows as they are: what is lost there is the rank."""
    seen: list[int] = []

    def stand_in(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[-1])
        return rows

    monkeypatch.setattr(bench_hqq, "as_hqq", stand_in)
    monkeypatch.setattr(bench_hqq, "MOST_KL", most)
    monkeypatch.setattr("sys.argv", [*arguments, "--part", "quality", "--kv-sizes", "20%"])
    assert bench_hqq.main() == code
    theirs, ours = json.loads((tmp_path / "hqq.json").read_text())["rows"]
    assert [row[1] for row in (theirs, ours)] == ["hqq", "codes"] and seen
    # 20 % of the bytes in 4.5 bits are 71 % of the numbers
    assert 0.16 < float(theirs[2].rstrip("%")) / 100 <= 0.2 and 0.16 < float(ours[2].rstrip("%")) / 100 <= 0.2
    assert theirs[6] is None and ours[6] == pytest.approx(float(ours[5]) / float(theirs[5]), rel=0.05)


def test_hqq_takes_groups_of_a_token(arguments: list[str]) -> None:
    pytest.importorskip("hqq")
    rows = torch.randn(2, 5, 100, generator=torch.Generator().manual_seed(0))
    found = bench_hqq.as_hqq(rows)
    error = float((found - rows).norm() / rows.norm())
    assert found.shape == rows.shape and 0 < error < 0.15
    torch.testing.assert_close(bench_hqq.as_hqq(rows[:, 2:3]), found[:, 2:3])

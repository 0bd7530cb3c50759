"""bench_real measures the rows that are missing, keeps each when it is done, and its exit code tells a bound that was missed."""

import json
from pathlib import Path

import bench_real
import pytest
from bench_real import Case, all_cases, main, misses, peer_gap


@pytest.fixture
def arguments(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on a tiny checkpoint, for which the table has widths that fit."""
    monkeypatch.setattr(bench_real, "PAIRS", {"50%": ("12+4",)})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 50 + 3}" for number in range(1500)), encoding="utf-8")
    options = ["--checkpoint", str(llama), "--text", str(text), "--calibration", str(text), "--window", "16"]
    options += ["--num-windows", "3", "--calibration-tokens", "1024", "--json", str(tmp_path / "real.json")]
    return options


def test_rows_are_kept_one_by_one_and_not_measured_again(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--rows", "50%/paper/*"]) == 0
    first = json.loads((tmp_path / "real.json").read_text())["rows"]
    assert list(first) == ["50%/paper/12+4"] and first["50%/paper/12+4"]["kv_share"] == 0.5
    assert {"perplexity_source", "gap", "kl", "top1"} <= set(first["50%/paper/12+4"]["fidelity"])
    assert first["50%/paper/12+4"]["machine"]["torch_threads"] == 1
    broken = Case(share="50%", method="transmla", size="50%")  # no way to split a budget: ends the run
    monkeypatch.setattr(bench_real, "all_cases", lambda: [*cases, broken])
    cases = [Case(share="50%", method=method, size="12+4") for method in ("paper", "transmla")]
    assert main(arguments) == 2
    assert "expected rank+rope such as 24+8, found '50%'" in capsys.readouterr().err
    rows = json.loads((tmp_path / "real.json").read_text())["rows"]
    assert list(rows) == ["50%/paper/12+4", "50%/transmla/12+4"] and rows["50%/paper/12+4"] == first["50%/paper/12+4"]
    main([*arguments, "--rows", "50%/paper/*", "--again"])
    printed = capsys.readouterr().out
    again = json.loads((tmp_path / "real.json").read_text())["rows"]
    assert again["50%/paper/12+4"]["conversion_seconds"] != first["50%/paper/12+4"]["conversion_seconds"]
    assert again["50%/paper/12+4"]["fidelity"] == first["50%/paper/12+4"]["fidelity"]
    assert "source" in printed and "transmla" in printed


def test_rows_of_other_settings_and_unknown_rows_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--rows", "50%/papyrus"]) == 2
    assert "--rows: no row is called '50%/papyrus'; --list shows their names." in capsys.readouterr().err
    assert main([*arguments, "--rows", "50%/paper/*"]) == 0
    assert main([*arguments, "--rows", "50%/paper/*", "--window", "20"]) == 2
    assert "has rows with window 16, expected 20; choose another file." in capsys.readouterr().err
    (tmp_path / "real.json").write_text("[]", encoding="utf-8")
    assert main([*arguments, "--rows", "50%/paper/*"]) == 2
    assert "expected results of this benchmark, found another file" in capsys.readouterr().err
    arguments[arguments.index("--text") + 1] = "absent.txt"
    (tmp_path / "real.json").unlink()
    assert main(arguments) == 2
    assert "--text: absent.txt: expected a text in UTF-8" in capsys.readouterr().err


def test_bounds_hold_budgets_to_their_figures_beside_the_peer() -> None:
    row = {"share": "50%", "size": "50%", "method": "calibrated", "fidelity": {"kl": 0.09, "gap": 0.1}}
    pair = row | {"size": "128+64", "fidelity": {"kl": 9.0, "gap": 9.0}}
    peers = [row | {"method": "transmla", "size": "x", "fidelity": {"kl": 1.0, "gap": gap}} for gap in (0.6, 0.4)]
    rows = {"pair": pair, "first peer": peers[0], "good": row}
    assert misses(rows) == [] and peer_gap(rows, "50%") == 0.6 and peer_gap(rows, "25%") is None
    assert misses(rows | {"peer": peers[1], "bad": row | {"fidelity": {"kl": 0.11, "gap": 0.2}}}) == [
        "bad: KL 0.1100, expected at most 0.1",
        "bad: 0.500 of the gap of TransMLA's method, expected 0.286",
    ]


def test_names_of_rows_are_unique_and_every_share_has_its_peer(capsys: pytest.CaptureFixture[str]) -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names) and "50%/sampled/50%/seed1" in names
    for share in bench_real.PAIRS:
        assert any(name.startswith(f"{share}/transmla/") for name in names)
    assert main(["--list"]) == 0 and capsys.readouterr().out.split() == names

"""bench_healing says what was measured: its tables, its exit code, its plot; and the loss measure runs both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_healing import main, unmet
from healing_loss import measure_loss


def run_of(init: str, perplexities: list[float]) -> dict[str, Any]:
    points = [{"tokens": 1000 * number, "perplexity": value} for number, value in enumerate(perplexities)]
    return {"kv": "25%", "init": init, "points": points}


def test_calibrated_early_must_beat_paper_late() -> None:
    good = [run_of("paper", [191.0, 40.0, 23.5]), run_of("calibrated", [8.0, 6.0, 5.0])]
    assert unmet(good) == []
    bad = [run_of("paper", [191.0, 40.0, 5.9]), run_of("calibrated", [8.0, 6.0, 5.0])]
    assert unmet(bad) == ["25%: calibrated 6.00, paper 5.90"]


def test_curves_are_plotted(tmp_path: Path) -> None:
    file, image = tmp_path / "curves.json", tmp_path / "plot.png"
    runs = [run_of("paper", [191.0, 40.0]), run_of("calibrated", [8.0, 6.0])]
    file.write_text(json.dumps({"kind": "curves", "checkpoint": "stories260k", "runs": runs}), encoding="utf-8")
    assert main(["plot", str(file), "--output", str(image)]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_both_ways_give_the_same_loss_and_the_chunked_one_less_memory() -> None:
    found = measure_loss(1024, 16, 30_000, "float32", trained_head=True, repeats=1)
    losses = [found["memory"][kind]["loss"] for kind in ("chunked", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert found["memory_ratio"] < 0.6


@pytest.mark.slow
def test_a_student_is_healed_and_measured_at_every_mark(shared: Path, tmp_path: Path) -> None:
    assert shared.is_dir()
    json_file = tmp_path / "curves.json"
    arguments = ["curves", "--checkpoint", "stories260k", "--kv", "25%", "--init", "paper", "--marks", "1024", "2048"]
    assert main([*arguments, "--work-dir", str(tmp_path / "work"), "--json", str(json_file)]) == 0
    (run,) = json.loads(json_file.read_text())["runs"]
    assert [point["tokens"] for point in run["points"]] == [0, 1024, 2048]
    assert run["points"][-1]["perplexity"] < run["points"][0]["perplexity"]

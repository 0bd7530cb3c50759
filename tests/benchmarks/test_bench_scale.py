"""bench_scale measures a layer as the difference of two depths, and counts what the formulas need."""

import json
from pathlib import Path
from typing import Any

import bench_scale
import pytest
from random_checkpoint import SHAPES

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_the_cost_of_a_layer_is_the_difference_of_two_depths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_scale, "SHAPES", {"tiny": {**SHAPES["qwen3-32b"], **TINY}})
    monkeypatch.setattr(bench_scale, "widths_of", lambda config: (8, 4))
    found: list[dict[str, dict[str, float]]] = []

    class Report:
        def __init__(self, layers: int) -> None:
            self.timings = {part: {"cpu_seconds": 1.0 + layers} for part in bench_scale._PARTS}

    def convert(source: Path, out: Path, **options: Any) -> Report:
        report = real(source, out, **options)
        found.append(report.timings)
        return Report(len(report.layers))

    real = bench_scale.xeco_convert.convert
    monkeypatch.setattr(bench_scale.xeco_convert, "convert", convert)
    file = tmp_path / "scale.json"
    assert bench_scale.main(["--shape", "tiny", "--tokens", "1024", "--layers-made", "3", "--json", str(file)]) == 0
    assert len(found) == 2 and all(set(bench_scale._PARTS) <= set(timings) for timings in found)
    row = json.loads(file.read_text())["rows"]["tiny"]
    assert row["cpu_seconds_of_a_layer"] == dict.fromkeys(bench_scale._PARTS, 1.0)
    assert row["extrapolated_cpu_seconds"] == 5 * 2.0 + 4 * 5 * 1.0
    assert "converted model" in capsys.readouterr().out


def test_what_is_counted_is_that_of_the_real_models() -> None:
    """Two for every weight and token, at least: 218 million weights in a layer of Llama-3.1-8B, 484 of Qwen3-32B."""
    for shape, weights in (("llama-3.1-8b", 218e6), ("qwen3-32b", 487e6)):
        found = bench_scale.counted(SHAPES[shape], 4096)
        assert 1 < found["source"] / (2 * 8192 * weights) < 1.05
        assert bench_scale.widths_of(SHAPES[shape]) == (896, 128)

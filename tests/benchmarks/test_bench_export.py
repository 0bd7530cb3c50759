"""bench_export fails where an export is not what it should be."""

import sys
from pathlib import Path
from typing import Any

import bench_export
import pytest

GOOD = {
    "target": "vllm",
    "kv_size": "50%",
    "kv_lora_rank": 256,
    "rope_dim": 64,
    "logits_difference": 1e-5,
    "greedy_equal": 100,
    "cache_bytes": 640,
    "expected_bytes": 640,
    "cache_tokens": 1,
}


@pytest.mark.parametrize(
    ("change", "code"),
    [({}, 0), ({"logits_difference": 2e-3}, 1), ({"greedy_equal": 99}, 1), ({"cache_bytes": 641}, 1)],
)
def test_a_row_that_misses_its_bound_fails(
    change: dict[str, Any], code: int, tinystories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_export.py", "--kv", "50%", "--targets", "vllm"])
    monkeypatch.setattr(bench_export, "measure", lambda *_arguments: {**GOOD, **change})
    with pytest.raises(SystemExit) as done:
        bench_export.main()
    assert done.value.code == code

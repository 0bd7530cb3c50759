"""bench_attention's parts work on tiny shapes; no test here looks at a clock."""

import argparse
import json
from pathlib import Path

import attention_generate
import attention_sweep
import bench_attention
import pytest
import torch
from attention_peers import ABSORBED, DECOMPRESSED, IMPLEMENTATIONS, OURS, SCALE, Case, Inputs
from bench_attention import Bound, Row, forward_and_backward
from timing import median_seconds

SMALL = {"dtype": torch.float32, "heads": 3, "rank": 16, "rope": 8, "nope": 12}
CASES = [Case(**SMALL, batch=2, queries=1, tokens=9), Case(**SMALL, batch=2, queries=7, tokens=7)]


@pytest.mark.parametrize("case", CASES, ids=["decode", "forward"])
def test_all_absorbed_forms_compute_the_same(case: Case) -> None:
    inputs = Inputs(case)
    ours, *others = (IMPLEMENTATIONS[name](inputs) for name in (OURS, *ABSORBED))
    assert ours.shape == (2, case.queries, 3, 16)
    for other in others:
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-5)


def test_training_differentiates_the_parts_that_a_model_has() -> None:
    gradients = []
    for name in (OURS, *ABSORBED):
        inputs = Inputs(CASES[1], training=True)
        IMPLEMENTATIONS[name](inputs).sum().backward()
        gradients.append([part.grad for part in inputs.parts])
        inputs.forget_gradients()
        assert all(part.grad is None for part in inputs.parts)
        forward_and_backward(name, inputs)()
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def test_the_decompressed_form_attends_causally_to_keys_of_every_head() -> None:
    inputs = Inputs(CASES[1]).with_keys()
    out = IMPLEMENTATIONS[DECOMPRESSED](inputs)
    queries = inputs.joined()[0][..., :20].transpose(1, 2)
    scores = (queries @ inputs.keys.transpose(2, 3) * SCALE).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ inputs.values, rtol=1e-4, atol=1e-5)


def test_work_is_counted_over_the_pairs_that_are_seen() -> None:
    decode, forward = CASES
    assert decode.flop == 2 * (2 * 16 + 8) * 3 * 2 * 9
    assert forward.flop == 2 * (2 * 16 + 8) * 3 * 2 * (7 * 8 / 2)
    assert decode.cache_bytes == 2 * 9 * 24 * 4


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        (Bound(absorbed=2.0), True),
        (Bound(absorbed=2.1), False),
        (Bound(absorbed=2.0, decompressed=8.0), True),
        (Bound(absorbed=2.0, decompressed=8.1), False),
        (Bound(absorbed=2.0, memory=0.2), True),
        (Bound(absorbed=2.0, memory=0.1), False),
    ],
)
def test_a_bound_holds_where_every_ratio_is_reached(bound: Bound, holds: bool) -> None:
    seconds = {OURS: 1.0, "absorbed sdpa": 2.0, "absorbed bmm": 3.0, DECOMPRESSED: 8.0}
    memory = {"absorbed sdpa": 0.9, "absorbed bmm": 0.15}
    row = Row(
        case="x",
        threads=1,
        seconds=seconds,
        gflop_per_second=50.0,
        bound=bound,
        peak_gflop_per_second=100.0,
        memory_share=memory,
    )
    assert row.holds is holds
    assert row.reachable == pytest.approx(4.0)
    assert len(row.cells()) == len(bench_attention.COLUMNS)


def test_runs_are_taken_in_turns() -> None:
    called: list[str] = []
    seconds = median_seconds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2)
    assert called == ["a", "a", "b", "b"] * 2
    assert set(seconds) == {"a", "b"}


def options(tmp_path: Path, **fields: object) -> argparse.Namespace:
    return argparse.Namespace(**{"threads": [1], "repeats": 1, "plot": None, "json": tmp_path / "found.json", **fields})


@pytest.mark.usefixtures("needs_extension")
def test_the_sweep_gives_table_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention_sweep, "RANKS", (16, 32))
    monkeypatch.setattr(attention_sweep, "TOKENS", (4, 130))
    monkeypatch.setattr(attention_sweep, "BATCHES", (1,))
    monkeypatch.setattr(attention_sweep, "measured_peaks", lambda dtype: (1e9, 1e9))
    assert attention_sweep.run_sweep(options(tmp_path, plot=tmp_path / "plot.svg")) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [point["rank"] for point in found["points"]] == [16, 16, 32, 32] * 2
    assert "16 + 16" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


@pytest.mark.usefixtures("needs_extension")
def test_generate_is_timed_from_a_full_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setattr(attention_generate, "NEW_TOKENS", 2)
    monkeypatch.setattr(
        attention_generate, "checkpoints", lambda folder: {"tiny": (llama, {"rank": 12, "rope_dim": 4})}
    )
    assert attention_generate.run_generate(options(tmp_path, contexts=[5])) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    assert row["context"] == 5 and row["ratio"] > 0

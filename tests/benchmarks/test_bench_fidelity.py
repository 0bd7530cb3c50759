"""bench_fidelity measures what it says, on any checkpoint, and its exit code tells a deviation."""

import json
import math
from pathlib import Path

import bench_fidelity
import pytest
import torch
from bench_fidelity import PRESETS, Preset, kv_options, main, parse_slice
from transformers import AutoModelForCausalLM

from xeco_convert.errors import OptionError


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "sequences.json"
    ids = torch.randint(3, 60, (6, 19), generator=torch.Generator().manual_seed(0))
    file.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return file


def arguments(checkpoint: Path, sequences: Path) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--ids", str(sequences), "--part=-4:", "--window", "19"]


def test_rows_are_what_was_asked_for_and_match_the_model(
    llama: Path, sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "fidelity.json"
    assert main([*arguments(llama, sequences), "--kv", "12+4", "8+2", "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "4 windows of 19 tokens" in printed and "1 thread" in printed
    assert "12 + 4" in printed and "8 + 2" in printed
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [row["kv_share"] for row in found["rows"]] == [16 / 32, 10 / 32]
    assert {row["fidelity"]["num_tokens"] for row in found["rows"]} == {4 * 18}
    assert {"cpu", "torch", "torch_threads", "date"} <= set(found["machine"])
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    windows = torch.tensor(json.loads(sequences.read_text(encoding="utf-8"))[-4:])
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert found["rows"][0]["fidelity"]["perplexity_source"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_text_is_measured_with_the_checkpoints_tokenizer(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a small text of the test. " * 40, encoding="utf-8")
    options = ["--checkpoint", str(llama), "--text", str(text), "--window", "16", "--num-windows", "3"]
    assert main([*options, "--kv", "12+4"]) == 0
    assert "3 windows of 16 tokens" in capsys.readouterr().out


def test_a_preset_that_deviates_fails(
    llama: Path, sequences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XECO_SHARED", "/")
    preset = Preset(
        checkpoint=str(llama).lstrip("/"),
        ids=str(sequences).lstrip("/"),
        window=19,
        num_windows=6,
        kv=("12+4",),
        expected_source=1.0,
        expected={("paper", "12+4"): 1.0},
    )
    monkeypatch.setitem(PRESETS, "stories260k", preset)
    assert main(["--preset", "stories260k"]) == 1
    printed = capsys.readouterr().out
    assert "not as expected: paper 12+4" in printed and "not as expected: source" in printed


def test_settings_of_a_preset_cannot_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "stories260k", "--window", "128"]) == 2
    assert "--window" in capsys.readouterr().err


def test_shares_wait_for_the_budget_and_other_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv_options("24+8") == {"rank": 24, "rope_dim": 8}
    monkeypatch.setattr(bench_fidelity.ConvertOptions, "names", classmethod(lambda cls: ("rank",)))
    with pytest.raises(OptionError, match="no KV budget yet, found '25%'"):
        kv_options("25%")
    monkeypatch.setattr(bench_fidelity.ConvertOptions, "names", classmethod(lambda cls: ("rank", "kv_size")))
    assert kv_options("12.5%") == {"kv_size": "12.5%"}
    with pytest.raises(OptionError, match="expected rank"):
        kv_options("24x8")


def test_slices_are_pythons() -> None:
    assert [list(range(9))[parse_slice(text)] for text in (":", "-2:", "3:5")] == [list(range(9)), [7, 8], [3, 4]]
    with pytest.raises(OptionError, match="expected a slice"):
        parse_slice("80")


@pytest.mark.slow
def test_baselines_and_every_way_to_calibrate_stand_in_one_table(
    llama: Path, sequences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, output = tmp_path / "tokens.json", tmp_path / "fidelity.json"
    ids = torch.randint(3, 60, (60, 64), generator=torch.Generator().manual_seed(1))
    tokens.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    options = ["--calibration", str(tokens), "--calibration-part", "0:50", "--calibration-tokens", "1024", "2048"]
    options += ["--refined-tokens", "1500", "--refine-steps", "2", "--init", *bench_fidelity.METHODS]
    assert main([*arguments(llama, sequences), *options, "--kv", "12+4", "--json", str(output)]) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    found = [(row["init"], row["calibration_tokens"]) for row in rows]
    assert found[:4] == [("paper", None), ("weights", None), ("transmla", 1024), ("transmla", 2048)]
    assert found[4:6] == [("calibrated", 1024), ("calibrated", 2048)] and found[8:] == [("refined", 1536)]
    assert [init for init, _ in found[6:8]] == ["sampled", "sampled"]
    assert {row["kv_share"] for row in rows} == {0.5} and {row["widths"] for row in rows} == {"12 + 4"}
    assert len({row["fidelity"]["kl"] for row in rows}) == len(rows)
    assert "transmla" in capsys.readouterr().out


def test_a_baseline_takes_no_share(llama: Path, sequences: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(llama, sequences), "--init", "weights", "--kv", "25%"]) == 2
    assert "weights: expected rank+rope such as 24+8, found '25%'" in capsys.readouterr().err


def test_presets_have_widths_for_their_baselines_and_bounds_for_their_sizes() -> None:
    for name in ("stories260k-calibrated", "tinystories-gqa-calibrated"):
        preset = PRESETS[name]
        assert set(preset.pairs) == set(preset.kv)
        for method in ("calibrated", "refined"):
            assert {kv for made, kv in preset.bounds if made == method} == set(preset.kv)
        assert {kv for _, kv in preset.aims} == set(preset.kv)
        used = {(method, pair) for pairs in preset.pairs.values() for method, pair in pairs.items()}
        assert set(preset.expected) <= used

"""bench_real_healing measures every point once, and its scores are those that `xeco-distill eval --tasks` gives."""

import json
from pathlib import Path

import bench_real
import bench_real_healing
import pytest
import torch
from bench_real_healing import main, perplexity_by_position
from task_scores import Request, log_likelihoods, score, score_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from xeco_convert import convert
from xeco_distill.evaluation.harness import file_scores
from xeco_distill.evaluation.task_files import read_task, task_files

ROWS = {
    "choices": [{"context": f"w{n} w9", "choices": [" w5", " w7 w8", " w31"], "answer": n % 3} for n in range(3, 12)],
    "contexts": [{"contexts": [f"w{n}", "w40"], "continuation": " w6 w3", "answer": n % 2} for n in range(3, 9)],
    "target": [{"context": f"w{n} w4 ", "target": " w7 w8"} for n in range(3, 7)],
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_scores_are_those_of_lm_eval(llama: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    files = [read_task(path) for path in task_files(tasks).values()]
    expected = file_scores(model, tokenizer, files)
    for batch_tokens in (1, 7, 1000):
        monkeypatch.setattr("task_scores._BATCH_TOKENS", batch_tokens)
        for file in files:
            found = score(model, tokenizer, file)
            assert found == pytest.approx({metric: expected[file.name][metric] for metric in found})
            assert {"acc", "acc_stderr", "rows"} <= set(found)
            assert ("acc_norm" in found) == ("acc_norm" in expected[file.name])
    limited = score_folder(model, tokenizer, tasks, 4)
    assert [each["rows"] for each in limited["tasks"].values()] == [4, 4, 4] and 0 <= limited["mean"]["mean"] <= 1


@pytest.mark.parametrize("bits", ["16", "3"])
def test_choices_that_share_their_beginning_score_as_by_themselves(bits: str, llama: Path, tmp_path: Path) -> None:
    convert(str(llama), tmp_path / "out", rank=16, rope_dim=8, cache_bits=bits, init="paper")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    row = [Request(context, " w7 w8 w9"[:end], 1) for context in ("w3", "w3 w7", "w4", "") for end in (3, 6, 9)]
    together = log_likelihoods(model, tokenizer, [row, row[:2]])
    alone = log_likelihoods(model, tokenizer, [[request] for request in row])
    assert [len(each) for each in together] == [12, 2] and len({round(value, 4) for ((value, _),) in alone}) == 12
    for (found, agreeing), ((expected, also),) in zip(together[0] + together[1], alone + alone[:2], strict=True):
        assert found == pytest.approx(expected, rel=1e-4) and agreeing == also


@torch.no_grad()
def test_perplexity_is_that_of_the_predictions_between_two_positions(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_real_healing, "POSITIONS", (0, 4, 16))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    windows = torch.arange(34).view(2, 17) % 20
    loss = -model(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    expected = {"0-4": float(loss[:, :4].mean().exp()), "4-16": float(loss[:, 4:].mean().exp())}
    assert perplexity_by_position(model, windows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_points_are_kept_one_by_one_and_not_measured_again(
    llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_real, "PAIRS", {"50%": ("12+4",)})
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(" ".join(f"w{number * number % 50 + 3}" for number in range(1500)), encoding="utf-8")
    common = ["--checkpoint", str(llama), "--calibration", str(text), "--data", str(text), "--text", str(text)]
    common += ["--tasks", str(tasks), "--window", "16", "--num-windows", "3", "--work-dir", str(tmp_path / "work")]
    common += ["--json", str(results), "--rows", "50%/paper/*", "50%/transmla/*"]
    heal = ["--heal", "--stages", "kl", "--seq-length", "16", "--held-out-tokens", "64", "--batch-size", "2"]
    assert main([*common, "--tokens", "0", "--at-once", "2"]) == 0
    assert "50%/paper/12+4, 0 tokens: perplexity" in capfd.readouterr().out
    before = json.loads(results.read_text())["rows"]
    assert set(before) == {"50%/paper/12+4", "50%/transmla/12+4"}
    assert main([*common, "--tokens", "0", "128", "--source", *heal]) == 0
    assert "50%/paper/12+4, 0 tokens" not in capfd.readouterr().out
    source = json.loads(results.read_text())["source"]
    assert source["fidelity"]["kl"] == 0 and set(source["tasks"]) == set(ROWS) and source["machine"]["torch"]
    for name, row in json.loads(results.read_text())["rows"].items():
        assert [point["tokens"] for point in row["points"]] == [0, 128]
        assert row["points"][0] == before[name]["points"][0] and row["kv_share"] == 0.5
        assert row["points"][1]["fidelity"] != row["points"][0]["fidelity"] and row["points"][1]["heal_seconds"] > 0
        assert set(row["points"][1]["tasks"]) == set(ROWS)
    assert main([*common, "--tokens", "256", "--heal", "--loss", "jsd", "--jsd-beta", "2"]) == 1
    assert "50%/paper/12+4: --jsd-beta" in capfd.readouterr().err

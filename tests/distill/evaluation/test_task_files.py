"""Tasks in files are scored by lm-eval as the script beside the files scores them, and rows of another form are refused."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xeco_convert.errors import OptionError
from xeco_distill.card import evaluation_section
from xeco_distill.cli import main
from xeco_distill.errors import DataError
from xeco_distill.evaluation.checkpoint import EvalOptions
from xeco_distill.evaluation.harness import file_scores, find_tasks
from xeco_distill.evaluation.task_files import NORMALISED, means, read_task

CHOICES = {"context": "the cat", "choices": [" sat", " ran away"], "answer": 1}
CONTEXTS = {"contexts": ["the cat", "a dog"], "continuation": " sat", "answer": 0}
TARGET = {"context": "the cat", "target": " sat"}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.slow
def test_scores_are_those_of_the_script_beside_the_files(shared: Path, tinystories: Path) -> None:
    folder = shared / "eval"
    if not (folder / "score.py").is_file():
        pytest.skip(f"no tasks in {folder}")
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    model = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32).eval()
    rows = dict.fromkeys(script.TASKS, 6) | {"mmlu": 4, "hellaswag": 4, "lambada": 4}
    found = file_scores(model, tokenizer, [read_task(folder / f"{name}.jsonl", rows[name]) for name in rows])
    expected = {name: script.score(model, tokenizer, name, rows[name]) for name in rows}
    for name in rows:
        metrics = {metric: found[name][metric] for metric in expected[name] if metric in found[name]}
        assert set(expected[name]) - set(metrics) <= {"acc_norm"} and len(metrics) >= 2
        assert metrics == pytest.approx({metric: expected[name][metric] for metric in metrics}, rel=1e-4)
    assert set(NORMALISED) == script.NORMED
    chosen = [expected[name]["acc_norm" if name in script.NORMED else "acc"] for name in rows]
    assert means(found)["mean"] == pytest.approx(sum(chosen) / len(chosen))


@torch.no_grad()
def test_every_form_is_scored_by_its_formula(llama: Path, tmp_path: Path) -> None:
    """Words that the tiny tokenizer knows; log-likelihoods one request at a time."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    choices = [{"context": f"w{n} w9", "choices": [" w5", " w7 w8", " w31"], "answer": n % 3} for n in range(3, 12)]
    contexts = [{"contexts": [f"w{n}", "w40"], "continuation": " w6 w3", "answer": n % 2} for n in range(3, 9)]
    targets = [{"context": f"w{n} w4", "target": " w7 w8"} for n in range(3, 7)]
    files = {"a": choices, "b": contexts, "c": targets}
    found = file_scores(model, tokenizer, [read_task(write(tmp_path / f"{n}.jsonl", *r)) for n, r in files.items()])

    def likelihood(context: str, continuation: str) -> float:
        prefix, ids = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (context, context + continuation)
        )
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logp[place - 1, ids[place]]) for place in range(len(prefix), len(ids)))

    def best(values: list[float]) -> int:
        return max(range(len(values)), key=values.__getitem__)

    sums = [[likelihood(row["context"], choice) for choice in row["choices"]] for row in choices]
    lengths = [2, 5, 3]
    scaled = [[value / length for value, length in zip(each, lengths, strict=True)] for each in sums]
    acc = [best(each) == row["answer"] for each, row in zip(sums, choices, strict=True)]
    norm = [best(each) == row["answer"] for each, row in zip(scaled, choices, strict=True)]
    assert found["a"]["acc"] == pytest.approx(sum(acc) / 9) and found["a"]["acc_norm"] == pytest.approx(sum(norm) / 9)
    p = sum(acc) / 9
    assert found["a"]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 8)) and found["a"]["rows"] == 9
    pairs = [[likelihood(context, row["continuation"]) for context in row["contexts"]] for row in contexts]
    acc = [best(each) == row["answer"] for each, row in zip(pairs, contexts, strict=True)]
    assert found["b"]["acc"] == pytest.approx(sum(acc) / 6) and "acc_norm" not in found["b"]
    nats = -sum(likelihood(row["context"], row["target"]) for row in targets) / 4
    assert found["c"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5) and found["c"]["acc"] <= 1


def test_rows_are_spread_over_the_file_and_fewer_than_wanted_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "pets.jsonl", *(TARGET | {"context": str(number)} for number in range(10)))
    assert [row["context"] for row in read_task(file, 3).rows] == ["0", "3", "6"] and len(read_task(file).rows) == 10
    with pytest.raises(
        OptionError, match=r"--limit: expected at least 11 rows in .*pets\.jsonl, found 10; lower --limit"
    ):
        read_task(file, 11)
    with pytest.raises(OptionError, match=r"expected at least 1 rows in .*empty\.jsonl, found 0"):
        read_task(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", r"pets\.jsonl:2: expected a row of a task, .*found 'text'\."),
        ({"question": "?"}, r"pets\.jsonl:2: expected a row of a task, \{\"context\", .*found 'question'\."),
        (TARGET, r"pets\.jsonl:2: .*the same in all rows; found 'context', 'target'\."),
        (
            CHOICES | {"choices": [" a"]},
            r"pets\.jsonl:2: choices: expected a list of at least two texts, found \[' a'\]",
        ),
        (
            CHOICES | {"choices": [" a", "b"]},
            "choices: expected a text that begins with a space and says more, found 'b'",
        ),
        (
            CHOICES | {"choices": [" a", " "]},
            "choices: expected a text that begins with a space and says more, found ' '",
        ),
        (CHOICES | {"context": 7}, "context: expected a text, found 7"),
        (CHOICES | {"context": ""}, "context: expected a text, found ''"),
        (CHOICES | {"answer": 2}, "answer: expected a number from 0 to 1, found 2"),
        (CHOICES | {"answer": "1"}, "answer: expected a number from 0 to 1, found '1'"),
        (CHOICES | {"answer": True}, "answer: expected a number from 0 to 1, found True"),
    ],
)
def test_rows_of_another_form_are_refused(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_task(write(tmp_path / "pets.jsonl", CHOICES, row))


def test_files_that_are_no_json_lines_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pets.jsonl"
    file.write_text('{"context": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"pets\.jsonl:1: expected a JSON object, found '\{\"context\":'"):
        read_task(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="expected a task of one JSON object a line, in UTF-8"):
        read_task(file)


def test_names_and_patterns_find_files_beside_yaml(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "data"):
        write(tmp_path / f"{name}.jsonl", CONTEXTS)
    (tmp_path / "data.yaml").write_text("task: data\ndataset_path: json\n", encoding="utf-8")
    tasks = find_tasks(["cats"], tmp_path, None)
    assert [file.name for file in tasks.files] == ["cats"] and tasks.names == []
    tasks = find_tasks(["*"], tmp_path, 1)
    assert [file.name for file in tasks.files] == ["cats", "dogs"] and tasks.names == ["*"]  # lm-eval's own for data
    with pytest.raises(OptionError, match=r"--include-tasks: expected a folder, found none at .*nowhere"):
        find_tasks(["cats"], tmp_path / "nowhere", None)
    with pytest.raises(OptionError, match="--include-tasks: expected --tasks with it, found none"):
        EvalOptions(include_tasks=tmp_path)
    with pytest.raises(OptionError, match="--limit: expected a whole number of at least 1, found 0"):
        EvalOptions(tasks="cats", limit=0)


def test_the_mean_is_that_of_the_tables_with_mmlu_beside_it() -> None:
    tasks = {
        "arc_challenge": {"acc": 0.2, "acc_stderr": 0.9, "acc_norm": 0.4, "acc_norm_stderr": 0.03},
        "piqa": {"acc": 0.6, "acc_stderr": 0.04, "acc_norm": 0.1, "acc_norm_stderr": 0.9},
        "mmlu": {"acc": 0.2, "acc_stderr": 0.0, "acc_norm": 0.3, "acc_norm_stderr": 0.9},
    }
    found = means(tasks)
    assert found["mean"] == pytest.approx(0.4) and found["mean_stderr"] == pytest.approx(0.05 / 3)
    assert found["mean_without_mmlu"] == pytest.approx(0.5)
    assert found["mean_without_mmlu_stderr"] == pytest.approx(0.025)
    assert set(means({"piqa": tasks["piqa"]})) == {"mean", "mean_stderr"} and set(means({"mmlu": tasks["mmlu"]})) == {
        "mean",
        "mean_stderr",
    }


def test_the_command_scores_files_and_writes_the_card(
    out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "cats.jsonl", *[CHOICES] * 4)
    write(tmp_path / "mmlu.jsonl", *[CHOICES] * 4)
    arguments = ["eval", str(out), "--data", str(text), "--tokens", "64", "--seq-length", "32", "--device", "cpu"]
    arguments += ["--tasks", "*", "--include-tasks", str(tmp_path), "--limit", "3"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json", str(tmp_path / "found.json")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tasks"]["cats"]["rows"] == 3 and found["tasks_mean"]["mean"] == found["tasks"]["cats"]["acc"]
    printed = capsys.readouterr().out
    assert "| cats | acc | " in printed and " ± 0.0000 |" in printed and "| cats | rows | 3 |" in printed
    assert "| mean of tasks in files | mean_without_mmlu | " in (out / "README.md").read_text()
    assert "mean" not in evaluation_section({"tasks": {"pets": {"acc": 0.5}}, "lm_eval": "0"})
    write(tmp_path / "cats.jsonl", {"question": "?"})
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1 and "cats.jsonl:1: expected a row of a task" in capsys.readouterr().err

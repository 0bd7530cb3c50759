"""`xeco-distill eval` measures what its formulas say, on text, in retrieval and on lm-eval tasks, and writes it down."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from xeco_convert.errors import OptionError
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.card import replace_section
from xeco_distill.cli import main
from xeco_distill.data import Document, RowWriter
from xeco_distill.errors import DataError
from xeco_distill.evaluation.checkpoint import EvalOptions, evaluate_checkpoint
from xeco_distill.evaluation.needle import DEPTHS, Trial, make_trial, retrieval, trials
from xeco_distill.evaluation.quality import measure_quality
from xeco_distill.teacher import Teacher


@torch.no_grad()
def test_quality_is_the_formula_document_by_document(
    converted_demo: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    models = [load_causal_lm(folder, torch.float32).eval() for folder in (teacher_folder, converted_demo)]
    generator = np.random.default_rng(0)
    documents = [generator.integers(4, 270, size).tolist() for size in (30, 7, 21, 40, 3)]
    writer = RowWriter(tmp_path, 48, padding=0)
    for document in documents:
        writer.add(Document(ids=document, learned=[True] * len(document)))
    rows = writer.finish()
    found = measure_quality(Teacher(models[0], 277), models[1], rows)
    nll, kl, same, count = [0.0, 0.0], 0.0, 0, 0
    for document in documents:
        ids = torch.tensor([document])
        logp = [functional.log_softmax(model(ids).logits[0, :-1].double(), dim=-1) for model in models]
        for which in (0, 1):
            nll[which] -= float(logp[which].gather(1, ids[0, 1:, None]).sum())
        kl += float((logp[0].exp() * (logp[0] - logp[1])).sum())
        same += int((logp[0].argmax(-1) == logp[1].argmax(-1)).sum())
        count += len(document) - 1
    assert found.num_tokens == count and found.top1 == same / count
    assert found.perplexity_source == pytest.approx(math.exp(nll[0] / count), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll[1] / count), rel=1e-5)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)


def test_a_teacher_measured_against_itself_is_perfect(converted_demo: Path, tmp_path: Path) -> None:
    model = load_causal_lm(converted_demo, torch.float32).eval()
    writer = RowWriter(tmp_path, 16, padding=0)
    writer.add(Document(ids=list(range(4, 20)), learned=[True] * 16))
    found = measure_quality(Teacher(model, 277), model, writer.finish())
    assert found.kl < 1e-6 and found.top1 == 1.0 and found.gap == 0


def test_a_needle_stands_at_its_depth_and_fills_the_context(teacher_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    haystack = [7] * 400
    places = []
    for depth in DEPTHS:
        trial = make_trial(tokenizer, haystack, 128, depth, seed=3)
        assert trial.ids.numel() == 128 and trial.num_answer >= 1
        strange = (trial.ids[1 : -trial.num_answer] != 7).nonzero()
        places.append(int(strange[0]))
    assert places == sorted(places) and places[0] == 0 and places[-1] > 60
    with pytest.raises(OptionError, match=r"--contexts: expected at least \d+ tokens .*, found 8"):
        make_trial(tokenizer, haystack, 8, 0.5, seed=3)
    with pytest.raises(DataError, match="expected 512 tokens of text to hide it in, found 400"):
        trials(tokenizer, haystack, 512, 1, seed=0)


def test_retrieval_counts_whole_answers_and_their_nats(converted_demo: Path) -> None:
    model = load_causal_lm(converted_demo, torch.float32).eval()
    start = torch.tensor([0, 9, 12, 40, 8])
    with torch.no_grad():
        ids = model.generate(
            start[None], attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=3, eos_token_id=None
        )[0]
    wrong = ids.clone()
    wrong[-1] = (wrong[-1] + 1) % 277
    found = retrieval(model, [Trial(ids=ids, num_answer=3), Trial(ids=wrong, num_answer=3)])
    assert found.accuracy == 0.5
    with torch.no_grad():
        logp = [functional.log_softmax(model(given[None]).logits[0].double(), -1) for given in (ids, wrong)]
    parts = [
        -logp[number][4 + place, given[5 + place]] for number, given in enumerate((ids, wrong)) for place in range(3)
    ]
    assert found.nats == pytest.approx(float(torch.stack(parts).mean()), rel=1e-5)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task of our own, offline."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [
        {"question": f"the cat {word}", "choices": ["sat", "ran"], "answer": n % 2} for n, word in enumerate("abcdef")
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "pets.yaml").write_text(
        f"""task: pets
dataset_path: json
dataset_kwargs:
  data_files: {folder / "data.jsonl"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
""",
        encoding="utf-8",
    )
    return folder


def test_the_command_measures_everything_and_writes_it_down(
    out: Path, text: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(out), "--data", str(text), "--tokens", "512", "--seq-length", "64", "--device", "cpu"]
    arguments += ["--contexts", "64,128", "--needles", "1", "--tasks", "pets", "--include-tasks", str(tasks)]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert 0 <= found["tasks"]["pets"]["acc"] <= 1 and found["quality"]["kl"] > 0
    assert [row["context"] for row in found["needle"]] == [64, 128]
    assert found["kv_bytes_after"] < found["kv_bytes_before"]
    card = (out / "README.md").read_text()
    assert "## Evaluation" in card and "| pets | acc |" in card and "KL from the teacher" in printed
    assert json.loads((out / "xeco_report.json").read_text())["evaluation"] == found


def test_on_sampled_text_and_without_a_card_nothing_changes(out: Path) -> None:
    before = (out / "README.md").read_bytes()
    found = evaluate_checkpoint(out, EvalOptions(tokens=128, seq_length=32, device="cpu"))
    assert found["quality"]["num_tokens"] > 100 and (out / "README.md").read_bytes() == before


def test_what_cannot_be_measured_is_refused(out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"data": str(text), "tokens": 128, "seq_length": 32, "device": "cpu"}
    with pytest.raises(
        OptionError, match="--contexts: expected lengths as 512,1024 up to the model's 512, found '1024'"
    ):
        evaluate_checkpoint(out, EvalOptions(**base, contexts="1024"))
    import functools
    import sys

    import lm_eval.tasks

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the whole list takes half a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    with pytest.raises(OptionError, match="--tasks: lm-eval knows no nonsense_task"):
        evaluate_checkpoint(out, EvalOptions(**base, tasks="nonsense_task"))

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"--tasks needs lm-eval: pip install 'xeco-convert\[eval\]'"):
        evaluate_checkpoint(out, EvalOptions(**base, tasks="pets"))


def test_a_section_of_the_card_is_replaced_not_repeated() -> None:
    card = "# Title\n\nWords.\n"
    once = replace_section(card, "Healing", "first")
    twice = replace_section(replace_section(once, "Evaluation", "other"), "Healing", "second\\1")
    assert "first" not in twice and twice.count("## Healing") == 1
    assert twice.index("second\\1") < twice.index("## Evaluation") and twice.startswith("# Title")

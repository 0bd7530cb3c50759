"""`heal` makes a converted model better, changes nothing else, and leaves a whole checkpoint at every moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import quick
from transformers import AutoModelForCausalLM, AutoTokenizer

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.pipeline import HealingReport, heal

pytestmark = pytest.mark.slow

Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def healed(converted_demo: Path, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, HealingReport]:
    output = tmp_path_factory.mktemp("healed") / "new"
    options = quick(
        output=str(output),
        stages="layers,kl",
        layer_steps=20,
        layer_tokens=4096,
        budget_tokens=4096,
        data=str(text),
        work_dir=str(output.with_name("work")),
    )
    return output, heal(converted_demo, options)


def test_every_measure_gets_better(healed: tuple[Path, HealingReport]) -> None:
    _, report = healed
    assert report.after["kl"] < 0.5 * report.before["kl"]
    assert report.after["perplexity"] < report.before["perplexity"]
    assert report.after["top1"] > report.before["top1"]
    assert report.tokens == 4096
    assert report.before["num_tokens"] == report.after["num_tokens"] > 200


def test_the_layer_wise_stage_keeps_what_is_best(healed: tuple[Path, HealingReport]) -> None:
    facts = healed[1].stages["layers"]
    for layer, errors in facts["errors"].items():
        assert errors[facts["kept"][layer]] == min(errors.values())
        assert errors[facts["kept"][layer]] < errors["start"]  # 0.94 of it and less were observed in 20 steps


def test_the_result_is_a_whole_checkpoint_of_the_same_form(
    healed: tuple[Path, HealingReport], converted_demo: Path, files: Files
) -> None:
    output, report = healed
    before, after = CheckpointIndex.open(converted_demo), CheckpointIndex.open(output)
    assert before.headers == after.headers
    old, new = files(converted_demo), files(output)
    assert set(old) == set(new)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"model.safetensors", "config.json", "xeco_report.json", "README.md"}
    config = json.loads(new["config.json"])
    assert config["conversion"]["healing"]["stages"].keys() == {"layers", "kl"}
    stored = json.loads(new["xeco_report.json"])["healing"]
    assert stored["after"]["kl"] == report.after["kl"]
    assert "## Healing" in new["README.md"].decode() and "KL from the teacher" in new["README.md"].decode()
    assert not output.with_name("work").exists()


def test_the_result_generates(healed: tuple[Path, HealingReport]) -> None:
    output, _ = healed
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("the", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, ids.shape[1] + 5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_in_place_the_weights_before_are_kept(out: Path, files: Files) -> None:
    before = files(out)
    report = heal(out, quick(train="attention"))  # text sampled from the teacher
    kept = out.with_name("out.before-healing")
    assert report.after["kl"] < report.before["kl"] and files(kept) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.before-healing"]


def test_only_attention_changes_where_only_attention_is_trained(out: Path) -> None:
    heal(out, quick(train="attention", balance=False, budget_tokens=256))
    before, after = (
        load_causal_lm(place, torch.float32).state_dict() for place in (out.with_name("out.before-healing"), out)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name for name in changed)


def test_without_the_original_nothing_is_kept(out: Path) -> None:
    heal(out, quick(keep_original=False, budget_tokens=256))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "reverse-kl"},
        {"loss": "jsd", "temperature": 1.5},
        {"loss": "forward-kl", "ce_weight": 0.3},
        {"loss": "cross-entropy"},
        {"top_k": 16},
    ],
    ids="-".join,
)
def test_every_loss_heals(out: Path, text: Path, fields: dict[str, object]) -> None:
    report = heal(out, quick(data=str(text), budget_tokens=1024, **fields))
    assert report.after["kl"] < 0.8 * report.before["kl"]


def test_samples_are_kept_for_other_runs(out: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    heal(out, quick(sample_cache=str(cache), budget_tokens=256))
    shards = list(cache.glob("*/shard-*.safetensors"))
    times = [path.stat().st_mtime_ns for path in shards]
    heal(out, quick(sample_cache=str(cache), budget_tokens=256, train="attention", keep_original=False))
    assert [path.stat().st_mtime_ns for path in cache.glob("*/shard-*.safetensors")] == times and len(shards) == 1


def test_minutes_alone_decide_the_tokens(out: Path) -> None:
    fields = {"budget_tokens": None, "budget_minutes": 0.02, "sample_tokens": 512, "keep_original": False}
    report = heal(out, quick(**fields))
    assert 0 < report.tokens < 200_000


def test_early_stopping_keeps_the_best(out: Path, text: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "eval_steps": 2, "save_steps": 2}
    report = heal(out, quick(data=str(text), learning_rate=0.3, patience=1, trainer=settings, keep_original=False))
    assert report.tokens < 2048


def test_yaml_settings_of_transformers_reach_the_trainer(out: Path, text: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    settings = {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "report_to": "tensorboard",
        "logging_dir": str(logs),
    }
    import os

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    try:
        report = heal(out, quick(data=str(text), trainer={k: v for k, v in settings.items() if k != "logging_dir"}))
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    assert report.stages["kl"]["steps"] == 8  # 2048 tokens in steps of 256
    assert report.after["kl"] < report.before["kl"]
    assert list(logs.rglob("events.out.tfevents*"))

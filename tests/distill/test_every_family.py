"""Healing serves every family: all its stages, its measures, and a run that goes on after a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VARIANTS, random_ids
from click.testing import CliRunner
from families import KINDS, make_student
from safetensors.torch import load_file
from transformers import TrainingArguments

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.families import supported_model_types
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.attention import balance_model
from xeco_distill.cli.evaluate import eval_command
from xeco_distill.cli.heal import distill_command
from xeco_distill.data import Document, RowWriter
from xeco_distill.options import DistillOptions
from xeco_distill.pipeline import heal
from xeco_distill.plan import Sizes, estimate, make_healing_plan
from xeco_distill.stages.layerwise import LayerwiseStage
from xeco_distill.teacher import hidden_states
from xeco_distill.trainable import choose_trained
from xeco_distill.trainer import DistillationTrainer, WholeLoading

# two steps of the kl stage and of each layer; what a newer transformers will drop must not be used
QUICK: dict[str, Any] = {
    "seq_length": 32,
    "batch_size": 2,
    "budget_tokens": 128,
    "held_out_tokens": 64,
    "layer_steps": 2,
    "layer_tokens": 256,
    "learning_rate": 1e-3,
    "device": "cpu",
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::FutureWarning")]


@pytest.fixture(scope="module", params=KINDS)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp(request.param), request.param)


def in_converted_attention(student: Path, name: str) -> bool:
    found = re.search(r"\.layers\.(\d+)\.(self_attn|attention)\.", name)
    entries = json.loads((student / "config.json").read_text())["mla_layers"]
    return found is not None and entries[int(found[1])] is not None


def options_of(student: Path, **fields: Any) -> DistillOptions:
    return DistillOptions(**{**QUICK, "data": str(student.with_name("text.txt")), **fields})


def test_every_family_is_here() -> None:
    assert {VARIANTS[kind]["model_type"] for kind in KINDS} == set(supported_model_types())


def test_all_stages_heal_and_train_nothing_but_what_was_asked_for(student: Path, tmp_path: Path) -> None:
    output = tmp_path / "healed"
    pairs = str(student.with_name("pairs.jsonl"))
    report = heal(
        student,
        options_of(student, train="attention", preferences=pairs, output=str(output), work_dir=str(tmp_path / "work")),
    )
    layers = report.stages["layers"]
    assert set(report.stages) == {"layers", "kl", "dpo"} and report.stages["kl"]["steps"] == 2
    for number, errors in layers["errors"].items():
        assert errors[layers["kept"][number]] <= errors["start"]
    before, after = load_file(student / "model.safetensors"), load_file(output / "model.safetensors")
    assert CheckpointIndex.open(output).headers == CheckpointIndex.open(student).headers
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(in_converted_attention(student, name) for name in changed)
    assert {name.split(".")[2] for name in changed} == {str(number) for number in layers["errors"]}
    assert report.after["kl"] != report.before["kl"]
    model = load_causal_lm(output, torch.float32)  # raises where a weight is missing
    assert bool(torch.isfinite(model(random_ids(1, 7)).logits).all())


def test_the_plan_counts_what_is_trained(student: Path) -> None:
    model = load_causal_lm(student, torch.float32)
    attention = {name: in_converted_attention(student, name) for name, _ in model.named_parameters()}
    for train in ("attention", "all", "norms"):
        options = options_of(student, train=train)
        number = choose_trained(model, train)
        sizes = Sizes.of(make_healing_plan(student, options))
        assert estimate(sizes, options, 32, world=1, flops=1e9).trained == number
        for name, parameter in model.named_parameters():
            chosen = train == "all" or attention[name] or (train == "norms" and "norm" in name)
            assert parameter.requires_grad == chosen, (train, name)


def test_balancing_changes_no_prediction(student: Path) -> None:
    model = load_causal_lm(student, torch.float32).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(random_ids(2, 20)).logits
        balance_model(model)
        after = model(random_ids(2, 20)).logits
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed and all(in_converted_attention(student, name) for name in changed)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))  # 2e-5 observed


@pytest.mark.parametrize("which", ["source", "out"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(student: Path, which: str) -> None:
    """Of the teacher and of the student: layers with windows, without rotation, with frequencies of their own."""
    model = load_causal_lm(student.with_name(which), torch.float32).eval()
    ids, lengths = random_ids(1, 20, seed=3), (8, 12)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    apart = [hidden_states(model, part, None) for part in ids.split(lengths, dim=1)]
    found = hidden_states(model, ids, positions)
    torch.testing.assert_close(found, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)  # 3e-6 observed


@torch.no_grad()
def test_the_layer_wise_stage_computes_what_the_model_does(student: Path, tmp_path: Path) -> None:
    """Layer by layer with the student's own factors, up to the final norm."""
    writer = RowWriter(tmp_path / "rows", 16, padding=0)
    for seed in range(8):
        ids = random_ids(1, 16 if seed % 2 else 9, seed=seed)[0].tolist()
        writer.add(Document(ids=ids, learned=[True] * len(ids)))
    indices = (CheckpointIndex.open(student.with_name(name)) for name in ("out", "source"))
    stage = LayerwiseStage(*indices, writer.finish(), tmp_path / "layers", options_of(student), torch.device("cpu"))
    states = torch.empty(0)
    for view in stage._stream.layers():
        states = states if view.number else view.inputs.clone()
        stage._advance(view, states, stage._own_layer(view.number) if view.number in stage._converted() else None)
    model = load_causal_lm(student, torch.float32).eval()
    outputs: list[Any] = []
    model.get_decoder().layers[-1].register_forward_hook(lambda module, given, output: outputs.append(output))
    model(stage._windows.ids)
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    counts = stage._windows.counts
    torch.testing.assert_close(states[counts], last[counts], rtol=1e-4, atol=1e-4)  # 4e-6 observed


def test_a_checkpoint_is_taken_up_whole(student: Path, tmp_path: Path) -> None:
    """Under whatever names the family's files have: experts one by one, another name of the head."""
    model = load_causal_lm(student, torch.float32)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint-1")
    trainer = WholeLoading(
        model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    )
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    for load in (lambda: trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1")), trainer._load_best_model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_commands_for_plans_and_measures_serve_it(student: Path) -> None:
    text = ("--data", str(student.with_name("text.txt")), "--seq-length", "32", "--device", "cpu")
    plan = CliRunner().invoke(distill_command, [str(student), "--dry-run", *text], catch_exceptions=False)
    measures = CliRunner().invoke(
        eval_command, [str(student), "--tokens", "64", "--no-card", *text], catch_exceptions=False
    )
    assert (plan.exit_code, measures.exit_code) == (0, 0)
    assert "stages: layers, kl" in plan.output and "KL from the teacher" in measures.output


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_neox"])
def test_a_killed_run_ends_bit_for_bit_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(tmp_path, kind)
    whole, killed = (
        options_of(
            student,
            stages="kl",
            budget_tokens=256,
            output=str(tmp_path / name),
            work_dir=str(tmp_path / f"{name}-work"),
        )
        for name in ("whole", "killed")
    )
    heal(student, whole)
    original = DistillationTrainer.compute_loss

    def stopped(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        heal(student, killed)
    monkeypatch.undo()
    heal(student, killed)
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()

"""A step's gradient is that of the token mean over the global batch, however the batch is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import quick
from torch.nn import functional
from transformers import TrainingArguments

from xeco_convert.pretrained import load_causal_lm
from xeco_distill.attention import balance_model
from xeco_distill.data import PackedRows
from xeco_distill.loss_terms import terms_of
from xeco_distill.options import DistillOptions
from xeco_distill.plan import Sizes, estimate
from xeco_distill.teacher import KeptTeacher, Teacher
from xeco_distill.trainable import choose_trained
from xeco_distill.trainer import DistillationTrainer
from xeco_distill.training_arguments import learning_rate, training_arguments


def uneven_rows(count: int = 4, length: int = 24) -> PackedRows:
    """Rows of which very different numbers of tokens count: a mean of means would differ from the mean."""
    generator = np.random.default_rng(1)
    mask = np.zeros((count, length), dtype=bool)
    for row in range(count):
        mask[row, : 2 + 6 * row] = True
    mask[:, -1] = False
    return PackedRows(
        input_ids=generator.integers(4, 270, (count, length)).astype(np.int32),
        position_ids=np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)),
        mask=mask,
    )


def trained(student: Path, teacher: Any, folder: Path, rows: int, batches: int, **settings: Any) -> Any:
    """One step of plain SGD: the change of the weights is the gradient."""
    model = load_causal_lm(student, torch.float32)
    choose_trained(model, "all")
    options = quick(batch_size=rows, trainer={"gradient_accumulation_steps": batches, "optim": "sgd", **settings})
    arguments = training_arguments(
        TrainingArguments,
        options,
        folder,
        max_steps=1,
        rate=0.1,
        fsdp_layers=None,
        on_cuda=False,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        eval_strategy="no",
        save_strategy="no",
    )
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        rows=uneven_rows(),
        held_out=uneven_rows(),
        terms=terms_of(options),
        teacher=teacher,
        measure=lambda model: {},
        callbacks=[],
    )
    trainer.train()
    return model, trainer


def test_accumulated_batches_give_the_step_of_one_and_of_the_formula(
    converted_demo: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = Teacher(load_causal_lm(teacher_folder, torch.float32), 277)
    whole, _ = trained(converted_demo, teacher, tmp_path, rows=4, batches=1)
    pieces, _ = trained(converted_demo, teacher, tmp_path, rows=1, batches=4)
    checkpointed, _ = trained(converted_demo, teacher, tmp_path, rows=4, batches=1, gradient_checkpointing=True)
    plain = load_causal_lm(converted_demo, torch.float32)
    rows = uneven_rows()
    batch = {name: torch.stack([rows[number][name] for number in range(4)]) for name in rows[0]}
    with torch.no_grad():
        teacher_logp = functional.log_softmax(teacher.model(batch["input_ids"]).logits, -1)
    student_logp = functional.log_softmax(plain(batch["input_ids"]).logits, -1)
    each = functional.kl_div(student_logp, teacher_logp, log_target=True, reduction="none").sum(-1)
    each[batch["mask"]].mean().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - 0.1 * parameter.grad
        for model in (whole, pieces, checkpointed):
            torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_logged_loss_is_the_token_mean(converted_demo: Path, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Teacher(load_causal_lm(teacher_folder, torch.float32), 277)
    logged = [
        trained(converted_demo, teacher, tmp_path, rows=rows, batches=4 // rows, logging_steps=1)[1].state.log_history[
            0
        ]
        for rows in (4, 1)
    ]
    assert logged[0]["loss"] == pytest.approx(logged[1]["loss"], rel=1e-5)
    assert logged[0]["forward_kl"] == pytest.approx(logged[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("train", ["attention", "norms", "all"])
def test_what_trains_is_what_was_asked_for(converted_demo: Path, train: str) -> None:
    model = load_causal_lm(converted_demo, torch.float32)
    count = choose_trained(model, train)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert count == sum(model.get_parameter(name).numel() for name in names)
    assert any("self_attn.kv_b_proj" in name for name in names)
    assert any("norm" in name and "self_attn" not in name for name in names) == (train != "attention")
    assert any("mlp" in name or "embed" in name for name in names) == (train == "all")


def test_balancing_changes_no_prediction(converted_demo: Path) -> None:
    model = load_causal_lm(converted_demo, torch.float32).eval()
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        before = model(ids).logits
        weight = model.model.layers[0].self_attn.kv_b_proj.weight.clone()
        balance_model(model)
        after = model(ids).logits
    assert not torch.equal(weight, model.model.layers[0].self_attn.kv_b_proj.weight)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_kept_predictions_come_back_by_row() -> None:
    ids = np.arange(24, dtype=np.int32).reshape(3, 4, 2)
    found = KeptTeacher(ids, -ids.astype(np.float32)).predict_rows(torch.tensor([2, 0]))
    assert found.ids.tolist() == [ids[2].tolist(), ids[0].tolist()] and found.ids.dtype == torch.int64
    assert torch.equal(found.log_probabilities, -found.ids.float())


def test_the_default_learning_rate_follows_the_width() -> None:
    options = DistillOptions()
    assert learning_rate(options, 2048) == 8e-5 and learning_rate(options, 4096) == 4e-5
    assert learning_rate(options, 64) == 5e-4 and learning_rate(DistillOptions(learning_rate=1e-4), 64) == 1e-4


def test_the_estimate_counts_what_it_says() -> None:
    sizes = Sizes(
        parameters=1000,
        attention=300,
        norms=10,
        teacher=2000,
        teacher_bytes=4000,
        hidden_size=8,
        num_layers=2,
        vocab_size=16,
    )
    options = DistillOptions(train="norms", budget_tokens=100, batch_size=2)
    found = estimate(sizes, options, 32, world=1, flops=1e6)
    assert (found.student_bytes, found.optimizer_bytes, found.teacher_bytes) == (4000, 12 * 310, 4000)
    assert found.seconds == pytest.approx(100 * (2 * 2000 + 4 * 1000 + 2 * 310) / 0.4e6)
    halved = estimate(sizes, options, 32, world=2, flops=1e6)
    assert halved.student_bytes == 2000 and halved.seconds == pytest.approx(found.seconds / 2)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("error")
def test_a_setting_that_transformers_renamed_is_taken_by_both_names(name: str, tmp_path: Path) -> None:
    options = quick(trainer={name: True})
    found = training_arguments(
        TrainingArguments, options, tmp_path, max_steps=1, rate=0.1, fsdp_layers=None, on_cuda=False
    )
    assert found.gradient_checkpointing is True
    sizes = {"parameters": 9, "attention": 3, "norms": 1, "teacher": 9, "teacher_bytes": 18, "vocab_size": 16}
    few, many = (
        estimate(Sizes(**sizes, hidden_size=64, num_layers=9), given, 32, world=1, flops=1e6)
        for given in (options, quick())
    )
    assert few.activation_bytes < many.activation_bytes

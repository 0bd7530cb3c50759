"""Perplexity, KL to the teacher and top-1 agreement on packed rows, for any pair of models and any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xeco_convert.quality import Fidelity, FidelitySums, prediction_sums
from xeco_convert.quality.fidelity import perplexity

from ..data import PackedRows
from ..errors import HealingError
from ..losses.chunked import Term, chunked_loss
from ..losses.cross_entropy import CrossEntropy
from ..losses.forward_kl_top_k import ForwardKLTopK
from ..losses.prediction import Prediction, TopKPrediction
from ..teacher import KeptTeacher, Teacher, hidden_states, output_head

_LOGITS_PER_CHUNK = 2**24
_ROWS_PER_BATCH = 4


def call_directly(model: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """How to run work on a model that nothing wraps; one inside a trainer is called with the work instead."""
    return work(model, *arguments)


@torch.no_grad()
def measure_quality(
    teacher: Teacher,
    student: Any,
    rows: PackedRows,
    call: Callable[..., Any] = call_directly,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Fidelity:
    """Compare `student`, a causal language model, with its teacher over the predictions of `rows` that count.

    Each computes on its own device in its own dtype; logits are taken to float32, sums to float64. In a distributed run
    every process takes a share of the rows; all get the result. Raises `HealingError` for NaN, and for nothing to measure.
    `on_progress` is told the share done.
    """
    world, rank = _world()
    sums = FidelitySums()
    training = student.training
    student.eval()
    try:
        for start in range(0, len(rows), _ROWS_PER_BATCH * world):
            on_progress(start / len(rows))
            mine = range(start + rank, min(start + _ROWS_PER_BATCH * world, len(rows)), world)
            # sharded models need every process in every forward: one without a row of its own looks at row 0, uncounted
            batch = [rows[number] for number in mine] or [rows[0]]
            stacked = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
            if not mine:
                stacked["mask"] = torch.zeros_like(stacked["mask"])
            prediction = teacher.predict(stacked["input_ids"], stacked["position_ids"])
            sums.add(call(student, student_sums, prediction, stacked))
    finally:
        student.train(training)
    if world > 1:
        sums.add_all_processes(next(student.parameters()).device)
    if sums.num_tokens == 0:
        raise HealingError("there is no text to measure on; give more --data, or fewer --held-out-tokens.")
    if sums.nan_in is not None:
        raise HealingError("the healed model gives NaN on held-out text; its weights are broken.")
    return sums.fidelity(len(rows))


@torch.no_grad()
def measure_kept(
    teacher: KeptTeacher, student: Any, rows: PackedRows, call: Callable[..., Any] = call_directly
) -> dict[str, float]:
    """Held-out KL over the teacher's kept tokens (a lower bound of the whole), and the student's perplexity."""
    world, rank = _world()
    sums = torch.zeros(3, dtype=torch.float64)  # KL, NLL, tokens
    training = student.training
    student.eval()
    try:
        for start in range(0, len(rows), world):
            mine = start + rank < len(rows)
            row = rows[start + rank if mine else 0]
            batch = {name: value[None].to(next(student.parameters()).device) for name, value in row.items()}
            batch["mask"] &= mine
            sums += call(student, _kept_sums, teacher.predict_rows(batch["row"]), batch)
    finally:
        student.train(training)
    if world > 1:
        total = sums.to(next(student.parameters()).device, torch.float32)
        torch.distributed.all_reduce(total)
        sums = total.double().cpu()
    kl, loss, count = sums.tolist()
    return {"kl": kl / count, "perplexity": perplexity(loss / count)}


def _kept_sums(student: Any, teacher: TopKPrediction, batch: dict[str, Tensor]) -> Tensor:
    hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
    prediction = Prediction(hidden=hidden, head=output_head(student))
    terms = (Term(name="kl", loss=ForwardKLTopK()), Term(name="ce", loss=CrossEntropy()))
    result = chunked_loss(terms, prediction, teacher, batch["mask"], batch["targets"])
    return torch.tensor(
        [*(float(part) for part in result.parts.values()), float(result.num_tokens)], dtype=torch.float64
    )


def student_sums(student: Any, teacher: Prediction, batch: dict[str, Tensor]) -> Tensor:
    """The five sums of one batch of rows [B, L]."""
    device = next(student.parameters()).device
    mask = batch["mask"].flatten()
    targets = batch["targets"].flatten()[mask]
    hidden = hidden_states(student, batch["input_ids"].to(device), batch["position_ids"].to(device))
    states = hidden.flatten(0, 1)[mask.to(device)]
    teacher_states = teacher.hidden.flatten(0, 1)[mask.to(teacher.hidden.device)]
    head = output_head(student)
    chunk = max(1, _LOGITS_PER_CHUNK // head.weight.shape[0])
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, targets.numel(), chunk):
        part = slice(start, start + chunk)
        teacher_logits = teacher.head.logits(teacher_states[part].to(teacher.head.weight.dtype))
        sums += prediction_sums(teacher_logits, head.logits(states[part].to(head.weight.dtype)), targets[part])
    return sums


def _world() -> tuple[int, int]:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()

"""Memory and time of the chunked loss beside full logits, each measured in a process of its own.

Peak memory is the kernel's high-water mark of the process (VmHWM) less what it holds before the loss: hidden states, heads
and the interpreter are the same for both. Times are medians; both alternate in one process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from xeco_convert.quality import OutputHead
from xeco_distill.losses.chunked import Term, chunked_loss
from xeco_distill.losses.forward_kl import ForwardKL
from xeco_distill.losses.prediction import Prediction

KINDS = ("chunked", "full")


def inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, trained_head: bool) -> Any:
    """Student and teacher predictions on random numbers; logits of unit size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    def side() -> Prediction:
        weight = (draw(vocabulary, hidden) / hidden**0.5).to(dtype)
        return Prediction(hidden=draw(1, tokens, hidden), head=OutputHead(weight=weight))

    student, teacher = side(), side()
    student.hidden.requires_grad_(True)
    student.head.weight.requires_grad_(trained_head)
    return student, teacher, torch.ones(1, tokens, dtype=torch.bool)


def run_once(kind: str, student: Prediction, teacher: Prediction, mask: torch.Tensor) -> float:
    """Loss and gradients once; the loss."""
    student.hidden.grad = student.head.weight.grad = None
    if kind == "chunked":
        loss = chunked_loss([Term(name="kl", loss=ForwardKL())], student, teacher, mask).total
    else:
        with torch.no_grad():
            teacher_logp = functional.log_softmax(teacher.head.logits(teacher.hidden).float(), dim=-1)
        student_logp = functional.log_softmax(student.head.logits(student.hidden).float(), dim=-1)
        loss = functional.kl_div(student_logp, teacher_logp, log_target=True, reduction="sum")
    loss.backward()
    return float(loss.detach())


def high_water_bytes() -> int:
    """Peak resident memory of this process since it was last reset."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the peak of one kind, or the times of both."""
    torch.set_num_threads(1)
    given = inputs(
        *(arguments[name] for name in ("tokens", "hidden", "vocabulary")),
        getattr(torch, arguments["dtype"]),
        arguments["trained_head"],
    )
    if arguments["measure"] == "memory":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = high_water_bytes()
        loss = run_once(arguments["kind"], *given)
        return {"loss": loss, "held_bytes": before, "peak_bytes": high_water_bytes() - before}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments["repeats"]):
        for kind in KINDS:
            began = time.process_time()
            run_once(kind, *given)
            times[kind].append(time.process_time() - began)
    return {kind: statistics.median(values) for kind, values in times.items()} | {"all": times}


def measure_loss(
    tokens: int, hidden: int, vocabulary: int, dtype: str, trained_head: bool, repeats: int
) -> dict[str, Any]:
    """Peak bytes and median CPU seconds of both, and their ratios."""
    base = {
        "tokens": tokens,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "trained_head": trained_head,
        "repeats": repeats,
    }
    memory = {kind: _run({**base, "measure": "memory", "kind": kind}) for kind in KINDS}
    times = _run({**base, "measure": "time"})
    return {
        **base,
        "memory": memory,
        "seconds": times,
        "memory_ratio": memory["chunked"]["peak_bytes"] / memory["full"]["peak_bytes"],
        "time_ratio": times["chunked"] / times["full"],
    }


def _run(arguments: dict[str, Any]) -> Any:
    done = subprocess.run([sys.executable, __file__, json.dumps(arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))

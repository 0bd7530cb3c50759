"""Two processes over gloo: FSDP2 as the trainer does it gives DTensors and the losses of one process, and so does torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_trainer import uneven_rows

from xeco_convert.pretrained import load_causal_lm
from xeco_distill.evaluation.quality import measure_quality
from xeco_distill.losses.chunked import Term
from xeco_distill.losses.forward_kl import ForwardKL
from xeco_distill.sharding import shard
from xeco_distill.teacher import Teacher
from xeco_distill.trainer import distillation_loss, run_inside

pytestmark = pytest.mark.slow

STEPS = 3


def train(
    student_folder: Path, teacher_folder: Path, rank: int, world: int, sharded: bool
) -> tuple[list[float], float, list[str]]:
    """Losses of some SGD steps on the same global batch, held-out KL after them, and the kinds of the parameters."""
    import types

    student = load_causal_lm(student_folder, torch.float32)
    teacher_model = load_causal_lm(teacher_folder, torch.float32).requires_grad_(False)
    if sharded:
        shard(teacher_model, torch.device("cpu"), root=teacher_model.get_decoder())
        shard(student, torch.device("cpu"))
    student.forward = types.MethodType(run_inside, student)
    teacher = Teacher(teacher_model, 277)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.005)
    rows = uneven_rows()
    mine = [rows[number] for number in range(rank, len(rows), world)]
    batch = {name: torch.stack([row[name] for row in mine]) for name in mine[0]}
    del batch["row"]
    tokens = int(rows.mask.sum())
    losses = []
    for _ in range(STEPS):
        prediction = teacher.predict(batch["input_ids"], batch["position_ids"])
        terms = (Term(name="forward_kl", loss=ForwardKL()),)
        found = student(distillation_loss, **batch, teacher=prediction, terms=terms)
        loss = found["loss"] / tokens * world  # FSDP2 averages gradients over processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = found["loss"].detach() / tokens
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total))
    quality = measure_quality(teacher, student, uneven_rows(), call=lambda model, work, *given: model(work, *given))
    kinds = sorted(
        {type(parameter).__name__ for parameter in [*student.parameters(), *teacher_model.get_decoder().parameters()]}
    )
    return losses, quality.kl, kinds


def worker(rank: int, world: int, student: str, teacher: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = train(Path(student), Path(teacher), rank, world, sharded=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_sharded_processes_train_as_one(converted_demo: Path, teacher_folder: Path, tmp_path: Path) -> None:
    mp.spawn(worker, (2, str(converted_demo), str(teacher_folder), str(tmp_path)), nprocs=2)
    alone = train(converted_demo, teacher_folder, 0, 1, sharded=False)
    for rank in (0, 1):
        losses, kl, kinds = json.loads((tmp_path / f"{rank}.json").read_text())
        assert kinds == ["DTensor"]
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert kl == pytest.approx(alone[1], rel=1e-4)
    assert alone[0][-1] < alone[0][0]


def test_torchrun_heals_with_two_processes(out: Path, tmp_path: Path, text: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29519",
        "-m",
        "xeco_distill",
        str(out),
        "--data",
        str(text),
        "--device",
        "cpu",
        "--stages",
        "layers,kl",
        "--seq-length",
        "64",
        "--batch-size",
        "1",
        "--budget-tokens",
        "1024",
        "--held-out-tokens",
        "256",
        "--layer-tokens",
        "1024",
        "--layer-steps",
        "3",
        "--json",
        str(tmp_path / "report.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"]["kl"]["steps"] == 8  # 128 tokens a step, of two rows on two processes
    assert report["after"]["kl"] < report["before"]["kl"]
    assert done.stdout.count("perplexity") == 2  # one process prints

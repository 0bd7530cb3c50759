"""What bench_healing.py measures with: students of every initialisation, one trainer, one set of rows, one measure."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import baseline_model
from transformers import TrainingArguments

from xeco_convert import convert
from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.sampling import sample_rows
from xeco_convert.evaluate import sequence_windows, token_windows
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.attention import balance_model
from xeco_distill.data import PackedRows
from xeco_distill.data.rows import PackedRows as Rows
from xeco_distill.evaluation.quality import measure_quality
from xeco_distill.loss_terms import terms_of
from xeco_distill.options import DistillOptions
from xeco_distill.stages.layerwise import LayerwiseStage
from xeco_distill.teacher import Teacher
from xeco_distill.trainable import choose_trained
from xeco_distill.trainer import DistillationTrainer
from xeco_distill.training_arguments import training_arguments

SHARED = Path(os.environ.get("XECO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
INITS = ("paper", "transmla", "calibrated")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source, and the settings of its tables: `pairs` are (rank, rope dim) by share and init, None lets a KV budget
    choose."""

    name: str
    row_length: int
    text: str | None
    ids: str | None
    num_windows: int
    pairs: dict[str, dict[str, tuple[int, int]]]

    @property
    def folder(self) -> Path:
        return SHARED / "checkpoints" / self.name

    def held_out(self, tokenizer: Any) -> Rows:
        """The windows that measure: those of bench_fidelity.py."""
        if self.ids is not None:
            windows = sequence_windows(json.loads((SHARED / self.ids).read_text())[-80:], self.row_length)
        else:
            assert self.text is not None
            text = (SHARED / self.text).read_text(encoding="utf-8")
            windows = token_windows(text, tokenizer, self.row_length, self.num_windows)
        return rows_of(windows)


CHECKPOINTS = {
    "stories260k": Checkpoint(
        name="stories260k",
        row_length=256,
        text=None,
        ids="text/stories260k_samples.json",
        num_windows=80,
        pairs={
            "50%": {"paper": (24, 8), "transmla": (24, 8)},
            "37.5%": {"paper": (16, 8), "transmla": (16, 8)},
            "25%": {"paper": (12, 4), "transmla": (12, 4)},
            "12.5%": {"paper": (4, 4), "transmla": (4, 4)},
        },
    ),
    # the better of the published splits that were tried
    "tinystories-gqa": Checkpoint(
        name="tinystories-gqa",
        row_length=512,
        text="text/valid.txt",
        ids=None,
        num_windows=24,
        pairs={
            "50%": {"paper": (96, 32), "transmla": (64, 64)},
            "25%": {"paper": (32, 32), "transmla": (32, 32)},
            "12.5%": {"paper": (24, 8), "transmla": (16, 16)},
        },
    ),
}


def rows_of(windows: torch.Tensor) -> Rows:
    """Rows of one document each from windows [W, T] of token ids."""
    ids = windows.numpy().astype(np.int32)
    mask = np.ones(ids.shape, dtype=bool)
    mask[:, -1] = False
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return PackedRows(input_ids=ids, position_ids=positions, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A source with its teacher, its rows and what measures; `work` keeps students and samples between the runs."""

    checkpoint: Checkpoint
    teacher: Teacher
    tokenizer: Any
    held_out: Rows
    work: Path

    @classmethod
    def open(cls, name: str, work: Path) -> Bench:
        """Load the source."""
        from xeco_convert.tokenizer import load_tokenizer

        checkpoint = CHECKPOINTS[name]
        model = load_causal_lm(checkpoint.folder, torch.float32)
        tokenizer = load_tokenizer(checkpoint.folder)
        work.mkdir(parents=True, exist_ok=True)
        teacher = Teacher(model, model.config.vocab_size)
        return cls(
            checkpoint=checkpoint,
            teacher=teacher,
            tokenizer=tokenizer,
            held_out=checkpoint.held_out(tokenizer),
            work=work,
        )

    def sampled(self, tokens: int, seed: int = 1) -> Rows:
        """Rows sampled from the source, kept in `work`: more tokens begin with the same ones."""
        length = self.checkpoint.row_length
        parts = []
        for number in range(-(-tokens // (64 * length))):
            file = self.work / f"{self.checkpoint.name}-samples-{seed}-{number}.npy"
            if not file.is_file():
                ids, _ = sample_rows(self.teacher.model, 64, length, 1000 * seed + number, 64)
                np.save(file, ids.numpy())
            parts.append(torch.from_numpy(np.load(file)))
        return rows_of(torch.cat(parts)[: -(-tokens // length)])

    def text_rows(self, tokens: int, file: str = "text/train.txt") -> Rows:
        """Rows of real text."""
        length = self.checkpoint.row_length
        text = (SHARED / file).read_text(encoding="utf-8")
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return rows_of(token_windows(ids, None, length, -(-tokens // length)))

    def student(self, init: str, share: str) -> Path:
        """A converted checkpoint of this init and KV share, kept in `work`. Nothing measured takes part in calibration."""
        folder = self.work / f"{self.checkpoint.name}-{init}-{share.rstrip('%')}"
        if (folder / "config.json").is_file():
            return folder
        calibration = self._calibration()
        if init == "transmla":
            windows = CalibrationWindows(
                ids=calibration, counts=torch.ones_like(calibration, dtype=torch.bool), description="calibration"
            )
            pair = self.checkpoint.pairs[share][init]
            baseline_model(init, self.teacher.model, self.checkpoint.folder, pair, windows).save_pretrained(folder)
            return folder
        if init == "paper":
            rank, rope = self.checkpoint.pairs[share][init]
            convert(self.checkpoint.folder, folder, init=init, rank=rank, rope_dim=rope)
            return folder
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "calibration.json"
            file.write_text(json.dumps(calibration.tolist()), encoding="utf-8")
            convert(
                self.checkpoint.folder,
                folder,
                kv_size=share,
                calibration=str(file),
                calibration_tokens=calibration.numel(),
                refine=init == "refined",
            )
        return folder

    def _calibration(self) -> torch.Tensor:
        """The windows that bench_fidelity.py calibrates on."""
        if self.checkpoint.ids is not None:
            return sequence_windows(json.loads((SHARED / self.checkpoint.ids).read_text())[:80], 256)
        text = (SHARED / "text/train.txt").read_text(encoding="utf-8")
        return token_windows(text, self.tokenizer, 512, 24)

    def measure(self, model: Any, **options: Any) -> dict[str, float]:
        """Perplexity, KL and top-1 on the windows that measure."""
        found = measure_quality(self.teacher, model, self.held_out, **options)
        return {"perplexity": found.perplexity, "gap": found.gap, "kl": found.kl, "top1": found.top1}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a student is trained: as `xeco-distill` does with these options."""

    train: str = "all"
    loss: str = "forward-kl"
    ce_weight: float = 0.0
    learning_rate: float = 2e-3
    rows_per_step: int = 4
    schedule: str = "cosine"
    balance: bool = True
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    warmup_steps: int = 10


def train_and_measure(
    bench: Bench, student: Path, rows: Rows, marks: Sequence[int], settings: Settings, layers: Any = None
) -> dict[str, Any]:
    """Heal once over `rows` and measure at the start and after each of `marks` tokens. `layers`: options of the layer-wise
    stage before it."""
    began = time.monotonic()
    model = load_causal_lm(student, torch.float32)
    if layers is not None:
        heal_layers(bench, student, model, layers)
    if settings.balance:
        balance_model(model)
    choose_trained(model, settings.train)
    points = [{"tokens": 0, **bench.measure(model)}]
    per_step = settings.rows_per_step * rows.length
    steps = [max(1, round(mark / per_step)) for mark in marks]

    def measure(current: Any) -> dict[str, float]:
        step = trainer.state.global_step
        if step in steps:
            found = bench.measure(current, call=lambda model, work, *given: model(work, *given))
            points.append({"tokens": step * per_step, **found})
        return {"kl": points[-1]["kl"]}

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(bench, model, rows, settings, steps[-1], Path(folder), measure)
        trainer.args.eval_steps = trainer.state.eval_steps = _common_step(steps)
        trainer.train()
    return {"points": points, "seconds": time.monotonic() - began, "train": settings.train}


def _trainer(
    bench: Bench, model: Any, rows: Rows, settings: Settings, max_steps: int, folder: Path, measure: Any
) -> DistillationTrainer:
    options = DistillOptions(
        batch_size=settings.rows_per_step, train=settings.train, loss=settings.loss, ce_weight=settings.ce_weight
    )
    arguments = training_arguments(
        TrainingArguments,
        options,
        folder,
        max_steps=max_steps,
        rate=settings.learning_rate,
        fsdp_layers=None,
        on_cuda=False,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="no",
    )
    teacher = None if settings.loss == "cross-entropy" else bench.teacher
    return DistillationTrainer(
        model=model,
        args=arguments,
        rows=rows,
        held_out=bench.held_out,
        terms=terms_of(options),
        teacher=teacher,
        measure=measure,
        callbacks=[],
    )


def heal_layers(bench: Bench, student: Path, model: Any, options: DistillOptions) -> None:
    """The layer-wise stage, into a model in memory."""
    from xeco_convert.checkpoint import CheckpointIndex

    rows = bench.sampled(options.layer_tokens)
    name = f"{student.name}-{options.layer_inputs}-{options.layer_tokens}-{options.layer_steps}"
    folder = bench.work / f"layers-{name}"  # healed once for all variants
    stage = LayerwiseStage(
        CheckpointIndex.open(student),
        CheckpointIndex.open(bench.checkpoint.folder),
        rows,
        folder,
        options,
        torch.device("cpu"),
    )
    stage.run(lambda what, share, figures: None)
    state = model.state_dict()
    for name, tensor in stage.tensors().items():
        state[name].copy_(tensor)


def _common_step(steps: Sequence[int]) -> int:
    """The largest interval that meets all marks."""
    return int(np.gcd.reduce(list(steps)))

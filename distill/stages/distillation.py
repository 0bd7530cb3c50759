"""Stage (b): the whole student trained on the teacher's predictions by transformers' Trainer."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from xeco_convert.errors import OptionError

from ..arguments import accumulation, batch_rows, learning_rate, training_arguments
from ..attention import attention_modules
from ..callbacks import ProgressReports, Report, StopRequests, TimeLimit
from ..data import PackedRows
from ..errors import InterruptedRunError
from ..evaluation.quality import measure_kept, measure_quality
from ..losses import JSD, CrossEntropy, ForwardKL, ForwardKLTopK, ReverseKL, Term
from ..options import DistillOptions
from ..sharding import layer_classes
from ..stages.layerwise import balance_model
from ..teacher import KeptTeacher, Teacher, check_head
from ..trainer import COMPLETE, DistillationTrainer, distillation_loss, last_checkpoint
from ..work import RunFolder

_PROBED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stage runs: device, and its process among how many."""

    device: torch.device
    world: int
    rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shards(self, options: DistillOptions) -> bool:
        """Whether models are sharded over the processes. On CPUs accelerate knows no FSDP2, and copies are trained."""
        return self.world > 1 and options.sharding == "fsdp2" and self.device.type == "cuda"

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()


def loss_terms(options: DistillOptions) -> tuple[Term, ...]:
    """The loss that the options ask for, as a weighted sum."""
    if options.loss == "cross-entropy":
        return (Term(name="cross_entropy", loss=CrossEntropy()),)
    temperature = options.temperature
    if options.top_k is not None:
        divergence = Term(name="forward_kl", loss=ForwardKLTopK(), weight=1 - options.ce_weight)
    elif options.loss == "forward-kl":
        divergence = Term(name="forward_kl", loss=ForwardKL(temperature=temperature), weight=1 - options.ce_weight)
    elif options.loss == "reverse-kl":
        divergence = Term(name="reverse_kl", loss=ReverseKL(temperature=temperature), weight=1 - options.ce_weight)
    else:
        jsd = JSD(beta=options.jsd_beta, temperature=temperature)
        divergence = Term(name="jsd", loss=jsd, weight=1 - options.ce_weight)
    mix = (Term(name="cross_entropy", loss=CrossEntropy(), weight=options.ce_weight),) if options.ce_weight else ()
    return (divergence, *mix)


def choose_trained(model: Any, train: str) -> int:
    """Mark what is trained: attention (of converted layers), norms (and all norms), or all. Returns how many numbers."""
    attention = {parameter for module in attention_modules(model).values() for parameter in module.parameters()}
    norms = {
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    chosen = attention | norms if train == "norms" else attention
    for parameter in model.parameters():
        parameter.requires_grad_(train == "all" or parameter in chosen)
    trained: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == 0:
        raise OptionError("--train: this model has no converted layer to train; use --train all.")
    return trained


class DistillationStage:
    """One run of the Trainer, from `student` (in memory, float32) to the folder of the result."""

    def __init__(
        self,
        student: Any,
        teacher: Callable[[], Teacher],
        rows: tuple[PackedRows, PackedRows],
        work: RunFolder,
        options: DistillOptions,
        place: Place,
        report: Report,
        *,
        release_teacher: Callable[[], None] = lambda: None,
    ) -> None:
        """`rows`: to train on, and to measure on. `teacher` gives the teacher, loading it where it must;
        `release_teacher`: it is not needed for a while."""
        check_head(student, "student")
        if options.balance:
            balance_model(student)
        choose_trained(student, options.train)
        self._student = student if place.shards(options) else student.to(place.device)
        self._teacher, self._release = teacher, release_teacher
        self._rows, self._held_out = rows
        self._work, self._options, self._place, self._report = work, options, place, report
        self._folder = work.path("kl")
        self._held_out_teacher: KeptTeacher | None = None

    def run(self, result: Path) -> dict[str, Any]:
        """Train, or go on training, and save the student to `result`. Raises `InterruptedRunError` where the user stops it,
        `HealingError` where the loss is no number or the disk is full."""
        options = self._options
        remove_cut_off(self._folder, self._place)
        max_steps = self._max_steps()
        teacher = self._source_of_predictions()
        stop, limit = StopRequests(), self._time_limit()
        trainer = self._trainer(teacher, max_steps, [stop, limit])
        began = last_checkpoint(self._folder)
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if began is None else str(began))
        if self._place.is_main:
            self._work.write_json("kl-time.json", {"seconds": limit.spent})
        step = trainer.state.global_step
        if stop.stopped:
            raise InterruptedRunError(
                f"stopped after step {step} of {max_steps}; the state is kept in {self._folder}/checkpoint-{step}, and the "
                "same command continues from there."
            )
        trainer.save_model(str(result))
        self._student.__dict__.pop("forward", None)
        history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        per_step = batch_rows(options) * self._place.world * accumulation(options) * self._rows.length
        return {"steps": step, "tokens": step * per_step, "learning_rate": self._rate(), "history": history}

    def _source_of_predictions(self) -> Teacher | KeptTeacher | None:
        """Who predicts in training. What is kept of the teacher takes its place in memory, for measuring as well."""
        if self._options.top_k is not None:
            self._held_out_teacher = self._kept_predictions("held-out", self._held_out, self._options.top_k)
            kept = self._kept_predictions("train", self._rows, self._options.top_k)
            self._release()
            return kept
        return None if self._options.loss == "cross-entropy" else self._teacher()

    def _rate(self) -> float:
        return learning_rate(self._options, self._student.config.hidden_size)

    def _trainer(
        self, teacher: Teacher | KeptTeacher | None, max_steps: int, callbacks: list[TrainerCallback]
    ) -> DistillationTrainer:
        options, place = self._options, self._place
        arguments = training_arguments(
            TrainingArguments,
            options,
            self._folder,
            max_steps=max_steps,
            rate=self._rate(),
            fsdp_layers=layer_classes(self._student) if place.shards(options) else None,
            on_cuda=place.device.type == "cuda",
        )
        per_step = batch_rows(options) * place.world * accumulation(options) * self._rows.length
        callbacks = [*callbacks, ProgressReports(self._report, per_step, "kl")]
        if options.patience is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.patience))
        return DistillationTrainer(
            model=self._student,
            args=arguments,
            rows=self._rows,
            held_out=self._held_out,
            terms=loss_terms(options),
            teacher=teacher,
            measure=self._measure,
            callbacks=callbacks,
        )

    def _measure(self, model: Any) -> dict[str, float]:
        if self._held_out_teacher is not None:
            return measure_kept(self._held_out_teacher, model, self._held_out, call=_inside)
        found = measure_quality(self._teacher(), model, self._held_out, call=_inside)
        return {"kl": found.kl, "perplexity": found.perplexity, "top1": found.top1}

    def _time_limit(self) -> TimeLimit:
        minutes = self._options.budget_minutes
        spent = (self._work.read_json("kl-time.json") or {"seconds": 0.0})["seconds"]
        return TimeLimit(None if minutes is None else 60 * minutes, spent)

    def _max_steps(self) -> int:
        """From the tokens, or from the time and how long a step takes; decided once for the whole run."""
        kept = self._work.read_json("kl-steps.json")
        if kept is not None:
            return int(kept["max_steps"])
        options, place = self._options, self._place
        per_step = batch_rows(options) * place.world * accumulation(options) * self._rows.length
        if options.budget_minutes is None or options.budget_tokens is not None:
            steps = math.ceil(options.tokens / per_step)
        elif place.world > 1:
            raise OptionError("--budget-minutes: on several devices it needs --budget-tokens beside it; add them.")
        else:
            steps = max(1, int(0.95 * 60 * options.budget_minutes / self._seconds_per_step()))
        if place.is_main:
            self._work.write_json("kl-steps.json", {"max_steps": steps})
        return steps

    def _seconds_per_step(self) -> float:
        """Median time of a step's forward and backward on real rows; no weight changes."""
        terms, device, times = loss_terms(self._options), self._place.device, []
        for _ in range(_PROBED_STEPS):
            began = time.monotonic()
            for batch in range(accumulation(self._options)):
                rows = [self._rows[(batch + number) % len(self._rows)] for number in range(batch_rows(self._options))]
                inputs = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
                prediction = self._teacher().predict(inputs["input_ids"], inputs["position_ids"])
                del inputs["row"]
                distillation_loss(self._student, **inputs, teacher=prediction, terms=terms)["loss"].backward()
            times.append(time.monotonic() - began)
        self._student.zero_grad(set_to_none=True)
        return sorted(times)[_PROBED_STEPS // 2]

    def _kept_predictions(self, what: str, rows: PackedRows, k: int) -> KeptTeacher:
        """The teacher's top-k of these rows on disk, made once. The processes share the work."""
        shape = (len(rows), rows.length, min(k, self._student.config.vocab_size))
        kinds = {"ids": np.int32, "log_probabilities": np.float32}
        files = {name: self._work.path(f"top-k-{what}-{name}.bin") for name in kinds}
        if self._work.read_json(f"top-k-{what}.json") is None:
            if self._place.is_main:
                for name, kind in kinds.items():
                    np.memmap(files[name], kind, "w+", shape=shape).flush()
            self._place.barrier()
            arrays = {name: np.memmap(files[name], kind, "r+", shape=shape) for name, kind in kinds.items()}
            for start in range(0, shape[0], self._place.world):
                # a sharded teacher needs every process in every forward
                number = min(start + self._place.rank, shape[0] - 1)
                ids, logp = self._top_k_of(rows[number], shape[2])
                arrays["ids"][number], arrays["log_probabilities"][number] = ids.numpy(), logp.numpy()
                self._report("teacher's top-k", min(1.0, (start + self._place.world) / shape[0]), {})
            for array in arrays.values():
                array.flush()
            self._place.barrier()
            if self._place.is_main:
                self._work.write_json(f"top-k-{what}.json", {"shape": shape})
        read = {name: np.memmap(files[name], kind, "r", shape=shape) for name, kind in kinds.items()}
        return KeptTeacher(read["ids"], read["log_probabilities"])

    @torch.no_grad()
    def _top_k_of(self, row: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
        prediction = self._teacher().predict(row["input_ids"][None], row["position_ids"][None])
        ids, log_probabilities = [], []
        for part in prediction.hidden[0].split(128):
            found = functional.log_softmax(prediction.head.logits(part).float(), dim=-1).topk(k)
            ids.append(found.indices.int().cpu())
            log_probabilities.append(found.values.cpu())
        return torch.cat(ids), torch.cat(log_probabilities)


def _inside(model: Any, work: Any, *arguments: Any) -> Any:
    """Work on a model whose forward runs what it is given: wrappers have its weights whole there."""
    return model(work, *arguments)


def remove_cut_off(folder: Path, place: Place) -> None:
    """Delete checkpoints that a kill cut off, so that nothing mistakes them for whole ones."""
    if place.is_main and folder.is_dir():
        for path in folder.glob("checkpoint-*"):
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path, ignore_errors=True)
    place.barrier()


def fidelity_dict(found: Any) -> dict[str, Any]:
    """JSON types, the gap in nats with them."""
    return {**dataclasses.asdict(found), "gap": found.gap}

"""Stage (b): the whole student trained on the teacher's predictions by transformers' Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from xeco_convert.errors import OptionError

from ..attention import balance_model
from ..callbacks import ProgressReports, Report, StopRequests, TimeLimit
from ..data import PackedRows
from ..errors import InterruptedRunError
from ..evaluation.quality import measure_kept, measure_quality
from ..loss_terms import terms_of
from ..options import DistillOptions
from ..process import ProcessContext
from ..resume import RunFolder
from ..sharding import layer_classes
from ..teacher import KeptTeacher, Teacher, check_head
from ..trainable import choose_trained
from ..trainer import DistillationTrainer, distillation_loss, last_checkpoint, remove_cut_off
from ..training_arguments import accumulation, batch_rows, learning_rate, training_arguments

_PROBED_STEPS = 3


class DistillationStage:
    """One run of the Trainer, from `student` (in memory, float32) to the folder of the result."""

    def __init__(
        self,
        student: Any,
        teacher: Callable[[], Teacher],
        rows: tuple[PackedRows, PackedRows],
        work: RunFolder,
        options: DistillOptions,
        process: ProcessContext,
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
        self._student = student if process.shards(options.sharding) else student.to(process.device)
        self._teacher, self._release = teacher, release_teacher
        self._rows, self._held_out = rows
        self._work, self._options, self._process, self._report = work, options, process, report
        self._folder = work.path("kl")
        self._held_out_teacher: KeptTeacher | None = None

    def run(self, result: Path) -> dict[str, Any]:
        """Train, or go on training, and save the student to `result`. Raises `InterruptedRunError` where the user stops it,
        `HealingError` where the loss is no number or the disk is full."""
        options = self._options
        remove_cut_off(self._folder, self._process)
        max_steps = self._max_steps()
        teacher = self._source_of_predictions()
        stop, limit = StopRequests(), self._time_limit()
        trainer = self._trainer(teacher, max_steps, [stop, limit])
        began = last_checkpoint(self._folder)
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if began is None else str(began))
        if self._process.is_main:
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
        per_step = batch_rows(options) * self._process.world * accumulation(options) * self._rows.length
        return {"steps": step, "tokens": step * per_step, "learning_rate": self._rate(), "history": history}

    def _source_of_predictions(self) -> Teacher | KeptTeacher | None:
        """Who predicts in training: the teacher, or with --top-k its predictions on disk. These also serve for measuring then, so
        that the teacher is no longer needed in memory."""
        if self._options.top_k is not None:
            self._held_out_teacher = self._kept_predictions("held-out", self._held_out, self._options.top_k)
            predictions = self._kept_predictions("train", self._rows, self._options.top_k)
            self._release()
            return predictions
        return self._teacher() if self._options.objective.needs_teacher else None

    def _rate(self) -> float:
        return learning_rate(self._options, self._student.config.hidden_size)

    def _trainer(
        self, teacher: Teacher | KeptTeacher | None, max_steps: int, callbacks: list[TrainerCallback]
    ) -> DistillationTrainer:
        options, process = self._options, self._process
        arguments = training_arguments(
            TrainingArguments,
            options,
            self._folder,
            max_steps=max_steps,
            rate=self._rate(),
            fsdp_layers=layer_classes(self._student) if process.shards(options.sharding) else None,
            on_cuda=process.device.type == "cuda",
        )
        per_step = batch_rows(options) * process.world * accumulation(options) * self._rows.length
        callbacks = [*callbacks, ProgressReports(self._report, per_step, "kl")]
        if options.patience is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.patience))
        return DistillationTrainer(
            model=self._student,
            args=arguments,
            rows=self._rows,
            held_out=self._held_out,
            terms=terms_of(options),
            teacher=teacher,
            measure=self._measure,
            callbacks=callbacks,
        )

    def _measure(self, model: Any) -> dict[str, float]:
        if self._held_out_teacher is not None:
            return measure_kept(self._held_out_teacher, model, self._held_out, call=_inside)
        fidelity = measure_quality(self._teacher(), model, self._held_out, call=_inside)
        return {"kl": fidelity.kl, "perplexity": fidelity.perplexity, "top1": fidelity.top1}

    def _time_limit(self) -> TimeLimit:
        minutes = self._options.budget_minutes
        spent = (self._work.read_json("kl-time.json") or {"seconds": 0.0})["seconds"]
        return TimeLimit(None if minutes is None else 60 * minutes, spent)

    def _max_steps(self) -> int:
        """From the tokens, or from the time and how long a step takes; decided once for the whole run."""
        recorded = self._work.read_json("kl-steps.json")
        if recorded is not None:
            return int(recorded["max_steps"])
        options, process = self._options, self._process
        per_step = batch_rows(options) * process.world * accumulation(options) * self._rows.length
        if options.budget_minutes is None or options.budget_tokens is not None:
            steps = math.ceil(options.tokens / per_step)
        elif process.world > 1:
            raise OptionError("--budget-minutes: on several devices it needs --budget-tokens beside it; add them.")
        else:
            steps = max(1, int(0.95 * 60 * options.budget_minutes / self._seconds_per_step()))
        if process.is_main:
            self._work.write_json("kl-steps.json", {"max_steps": steps})
        return steps

    def _seconds_per_step(self) -> float:
        """Median time of a step's forward and backward on real rows; no weight changes."""
        terms, device, times = terms_of(self._options), self._process.device, []
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
            if self._process.is_main:
                for name, kind in kinds.items():
                    np.memmap(files[name], kind, "w+", shape=shape).flush()
            self._process.barrier()
            arrays = {name: np.memmap(files[name], kind, "r+", shape=shape) for name, kind in kinds.items()}
            for start in range(0, shape[0], self._process.world):
                # a sharded teacher needs every process in every forward
                number = min(start + self._process.rank, shape[0] - 1)
                ids, logp = self._top_k_of(rows[number], shape[2])
                arrays["ids"][number], arrays["log_probabilities"][number] = ids.numpy(), logp.numpy()
                self._report("teacher's top-k", min(1.0, (start + self._process.world) / shape[0]), {})
            for array in arrays.values():
                array.flush()
            self._process.barrier()
            if self._process.is_main:
                self._work.write_json(f"top-k-{what}.json", {"shape": shape})
        read = {name: np.memmap(files[name], kind, "r", shape=shape) for name, kind in kinds.items()}
        return KeptTeacher(read["ids"], read["log_probabilities"])

    @torch.no_grad()
    def _top_k_of(self, row: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
        prediction = self._teacher().predict(row["input_ids"][None], row["position_ids"][None])
        ids, log_probabilities = [], []
        for part in prediction.hidden[0].split(128):
            best = functional.log_softmax(prediction.head.logits(part).float(), dim=-1).topk(k)
            ids.append(best.indices.int().cpu())
            log_probabilities.append(best.values.cpu())
        return torch.cat(ids), torch.cat(log_probabilities)


def _inside(model: Any, work: Any, *arguments: Any) -> Any:
    """Work on a model whose forward runs what it is given: wrappers have its weights whole there."""
    return model(work, *arguments)

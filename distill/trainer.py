"""The transformers Trainer with a distillation loss: what a step computes, and what makes a run safe to stop anywhere.

The student's own forward is replaced by one that ends in the loss, so that every wrapper (DDP, FSDP2, autocast) sees an
ordinary call, and the head's weight is whole when it is used. Logits never leave that call.
"""

from __future__ import annotations

import math
import os
import shutil
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from xeco_convert.errors import first_line
from xeco_convert.pretrained import load_causal_lm

from .data import PackedRows
from .errors import HealingError
from .losses.chunked import Term, chunked_loss
from .losses.prediction import Prediction, TopKPrediction
from .process import ProcessContext
from .teacher import KeptTeacher, Teacher, hidden_states, output_head

COMPLETE = "complete"  # written last into a checkpoint: one without it was cut off and is never loaded


def run_inside(model: Any, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Takes the place of the student's forward: whatever `work` does with the model happens inside one call of it."""
    return work(model, *arguments, **named)


def distillation_loss(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    mask: Tensor,
    targets: Tensor,
    teacher: Prediction | TopKPrediction | None,
    terms: tuple[Term, ...],
) -> dict[str, Any]:
    """The summed loss over `mask`, and each term's own sum. Rows [B, L]."""
    student = Prediction(hidden=hidden_states(model, input_ids, position_ids), head=output_head(model))
    sums = chunked_loss(terms, student, teacher, mask, targets)
    return {"loss": sums.total, "parts": sums.parts}


class WholeLoading(Trainer):
    """A Trainer that takes up every weight of its checkpoints.

    Trainer itself looks for them under the names of the model's modules, and goes on without those that it does not find.
    Files hold the names of the family instead: experts one by one, the head of GPT-NeoX as embed_out.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # stored in shards, under the names of the modules
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._take_up(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._take_up(str(self.state.best_model_checkpoint))

    def _take_up(self, folder: str) -> None:
        self.model.load_state_dict(load_causal_lm(Path(folder), torch.float32).state_dict())


class DistillationTrainer(WholeLoading):
    """Trainer whose loss is a sum of terms over masked tokens, divided once by their number in the global batch."""

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        rows: PackedRows,
        held_out: PackedRows,
        terms: Iterable[Term],
        teacher: Teacher | KeptTeacher | None,
        measure: Any,
        callbacks: list[TrainerCallback],
    ) -> None:
        model.forward = types.MethodType(run_inside, model)
        super().__init__(
            model=model, args=args, train_dataset=rows, eval_dataset=held_out, callbacks=[*callbacks, MarkWhole()]
        )
        self.remove_callback(PrinterCallback)  # the command has a progress bar of its own
        self._teacher = teacher
        self._terms = tuple(terms)
        self._measure = measure
        self._part_sums: dict[str, Tensor] = {}
        self._part_tokens = torch.zeros((), dtype=torch.float64)
        # The loss is divided by the tokens of the whole batch here; Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and how many predictions count in them, over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        count = torch.tensor(sum(int(batch["mask"].sum()) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed loss over the tokens of the global batch; the gradient mean over processes is undone."""
        teacher: Prediction | TopKPrediction | None = None
        if isinstance(self._teacher, KeptTeacher):
            teacher = self._teacher.predict_rows(inputs["row"])
        elif self._teacher is not None:
            with torch.autocast(inputs["input_ids"].device.type, enabled=False):  # in its own dtype
                teacher = self._teacher.predict(inputs["input_ids"], inputs["position_ids"])
        outputs = model(
            distillation_loss,
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            mask=inputs["mask"],
            targets=inputs["targets"],
            teacher=teacher,
            terms=self._terms,
        )
        tokens = inputs["mask"].sum()
        count = tokens if num_items_in_batch is None else num_items_in_batch
        loss = (
            outputs["loss"] / torch.as_tensor(count, device=tokens.device).clamp_min(1) * self.accelerator.num_processes
        )
        if not math.isfinite(loss.item()):
            raise HealingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; training stopped and "
                f"{self.last_checkpoint_in_words()} Lower --learning-rate, or look at the data, and start it again."
            )
        self._count_parts(outputs["parts"], tokens)
        return (loss, outputs) if return_outputs else loss

    def last_checkpoint_in_words(self) -> str:
        """Where the last good state is: a sentence for errors."""
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        return "nothing was saved before it." if checkpoint is None else f"the last good state is kept in {checkpoint}."

    def _count_parts(self, parts: Mapping[str, Tensor], tokens: Tensor) -> None:
        for name, value in parts.items():
            self._part_sums[name] = self._part_sums.get(name, 0.0) + value.detach().double().cpu()
        self._part_tokens += tokens.detach().double().cpu()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each term's mean over the tokens since the last log."""
        if "loss" in logs and self._part_sums:
            sums = torch.stack([*self._part_sums.values(), self._part_tokens]).to(self.args.device, torch.float32)
            sums = self.accelerator.gather(sums[None]).sum(dim=0).cpu()
            logs = logs | {name: float(value / sums[-1]) for name, value in zip(self._part_sums, sums, strict=False)}
            self._part_sums, self._part_tokens = {}, torch.zeros((), dtype=torch.float64)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_arguments: Any, metric_key_prefix: str = "eval", **_named: Any) -> dict[str, float]:
        """Held-out perplexity, KL and top-1 agreement, instead of Trainer's loss."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(self.model).items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, but never weights that are no numbers, and a full disk in one sentence."""
        step = self.state.global_step
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                raise HealingError(
                    f"{name} holds NaN or infinite values after step {step}; it was not saved, and "
                    f"{self.last_checkpoint_in_words()} Lower --learning-rate and start again."
                )
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error) and "file" not in str(error).lower():
                raise
            reason = getattr(error, "strerror", None) or first_line(error)
            raise HealingError(
                f"{self.args.output_dir}: the state after step {step} could not be saved ({reason}); nothing else was lost: "
                f"{self.last_checkpoint_in_words()} Free some space, then the same command continues."
            ) from None


class MarkWhole(TrainerCallback):
    """Marks a checkpoint once everything is in it and on the disk."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_named: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        (folder / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that was saved whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_cut_off(folder: Path, process: ProcessContext) -> None:
    """Delete checkpoints that a kill cut off, so that nothing mistakes them for whole ones."""
    if process.is_main and folder.is_dir():
        for path in folder.glob("checkpoint-*"):
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path, ignore_errors=True)
    process.barrier()

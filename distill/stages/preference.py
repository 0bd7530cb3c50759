"""Stage (c): direct preference optimisation (arXiv 2305.18290) of the healed model by TRL's DPOTrainer."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from xeco_convert.calibration.files import read_records
from xeco_convert.calibration.records import checked_messages, fields_in_words, template_variables
from xeco_convert.errors import CheckpointError, OptionError
from xeco_convert.pretrained import load_causal_lm
from xeco_convert.tokenizer import load_tokenizer

from ..callbacks import ProgressReports, Report, StopRequests
from ..errors import DataError, HealingError, InterruptedRunError
from ..options import DistillOptions
from ..plan import HealingPlan
from ..process import ProcessContext
from ..resume import RunFolder
from ..sharding import layer_classes
from ..trainable import choose_trained
from ..trainer import MarkWhole, WholeLoading, last_checkpoint, remove_cut_off
from ..training_arguments import accumulation, batch_rows, training_arguments

_FIELDS = ("prompt", "chosen", "rejected")
_HELD_OUT_SHARE = 0.05
# Settings of --trainer that are the kl stage's alone; for dpo they are given as dpo.NAME.
_OF_KL = (
    "learning_rate",
    "warmup_steps",
    "warmup_ratio",
    "lr_scheduler_type",
    "eval_steps",
    "save_steps",
    "logging_steps",
)


def prefer(
    start: Path, result: Path, plan: HealingPlan, work: RunFolder, process: ProcessContext, report: Report
) -> dict[str, Any]:
    """Train the model in `start` on preferences, against itself as it was, and save it to `result`.

    Raises `OptionError` without TRL, `DataError` for records without prompt, chosen and rejected, `InterruptedRunError`.
    """
    dpo = _trl()
    options = plan.options
    tokenizer = load_tokenizer(plan.student.folder)
    chosen, held_out = _split(read_preferences(str(options.preferences), tokenizer))
    policy, reference = load_causal_lm(start, torch.float32), load_causal_lm(start, torch.float32)
    choose_trained(policy, options.train)
    folder = work.path("dpo")
    remove_cut_off(folder, process)
    per_step = batch_rows(options) * process.world * accumulation(options)
    max_steps = math.ceil(len(chosen) / per_step)
    arguments = _arguments(dpo.DPOConfig, options, folder, max_steps, policy, process, plan.seq_length)
    stop = StopRequests()
    callbacks: list[TrainerCallback] = [
        stop,
        MarkWhole(),
        _StopAtNan(),
        ProgressReports(report, per_step * plan.seq_length, "dpo"),
    ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    class PreferenceTrainer(WholeLoading, dpo.DPOTrainer):  # type: ignore[name-defined]
        """TRL's, which continues with every weight."""

    trainer = PreferenceTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=_data_set(chosen),
        eval_dataset=_data_set(held_out),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    began = last_checkpoint(folder)
    with stop.listening(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL calls transformers by names that are on their way out
        trainer.train(resume_from_checkpoint=None if began is None else str(began))
    if stop.stopped:
        raise InterruptedRunError(
            f"stopped after step {trainer.state.global_step} of {max_steps} of dpo; the same command continues from there."
        )
    trainer.save_model(str(result))
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    measured = [entry for entry in history if "eval_rewards/accuracies" in entry]
    last = measured[-1]["eval_rewards/accuracies"] if measured else None
    return {"steps": trainer.state.global_step, "pairs": len(chosen), "held_out_accuracy": last, "history": history}


def read_preferences(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Records with prompt, chosen and rejected: all text, or all lists of messages; with the tools of a chat as JSON, which
    TRL takes. Raises `DataError`."""
    found: list[dict[str, Any]] = []
    try:
        for record in read_records(name, "--preferences"):
            found.append(_checked(record, name, tokenizer))
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if len(found) < 2:
        raise DataError(f"--preferences: {name} holds {len(found)} records, expected at least 2; give more.")
    if len({type(record["prompt"]) for record in found}) > 1:
        raise DataError(
            f"--preferences: {name} holds text and lists of messages, expected one of them; divide the file."
        )
    return found


def _checked(record: Mapping[str, Any], name: str, tokenizer: Any) -> dict[str, Any]:
    """prompt, chosen and rejected of a record. Where the answers are whole chats (UltraFeedback and its kin), what they
    begin with alike is the prompt."""
    prompt, chosen, rejected = (record.get(key) for key in _FIELDS)
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    values = [prompt, chosen, rejected]
    if all(isinstance(value, str) and value for value in values):
        return dict(zip(_FIELDS, values, strict=True))
    if not all(isinstance(value, list) and value for value in values):
        raise DataError(
            f"--preferences: {name}: expected records with {', '.join(_FIELDS)}, each text or a list of messages and none "
            f"empty, found {fields_in_words(record)}."
        )
    try:
        chats = {key: checked_messages(value or []) for key, value in zip(_FIELDS, values, strict=True)}
        return {**chats, **_tools(template_variables(record, tokenizer))}
    except ValueError as error:
        raise DataError(f"--preferences: {name}: a chat cannot be used ({error}); change that record.") from None


def _tools(variables: dict[str, Any]) -> dict[str, str]:
    """A chat's tools, as text: one column of a table cannot hold tools of different fields. Raises `ValueError` for further
    variables of the template, which TRL takes the same for all records."""
    others = sorted(set(variables) - {"tools"})
    if others:
        raise ValueError(f"{others[0]} cannot be given to the chat template in preferences")
    return {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}


def _split(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    held_out = max(1, round(_HELD_OUT_SHARE * len(records)))
    return records[held_out:], records[:held_out]


def _arguments(
    kind: type[Any],
    options: DistillOptions,
    folder: Path,
    max_steps: int,
    policy: Any,
    process: ProcessContext,
    length: int,
) -> Any:

    settings = {key: value for key, value in options.trainer.items() if "." not in key and key not in _OF_KL}
    settings |= {key.removeprefix("dpo."): value for key, value in options.trainer.items() if key.startswith("dpo.")}
    on_cuda = process.device.type == "cuda"
    return training_arguments(
        kind,
        options.replace(trainer=settings, patience=None),
        folder,
        max_steps=max_steps,
        rate=options.dpo_learning_rate,
        fsdp_layers=layer_classes(policy) if process.shards(options.sharding) else None,
        on_cuda=on_cuda,
        beta=options.dpo_beta,
        max_length=length,
    )


def _data_set(records: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    columns = dict.fromkeys(column for record in records for column in record)
    return Dataset.from_list([{column: record.get(column) for column in columns} for record in records])


def _trl() -> Any:
    try:
        import trl
    except ImportError:
        raise OptionError("--stages: dpo needs TRL: pip install 'xeco-convert[dpo]'.") from None
    return trl


class _StopAtNan(TrainerCallback):
    """Ends the run where the loss is no number, before such weights are saved as the result."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_named: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            found = last_checkpoint(Path(str(args.output_dir)))
            kept = "nothing was saved before it." if found is None else f"the last good state is kept in {found}."
            raise HealingError(
                f"dpo: the loss is {loss} at step {state.global_step}; {kept} Lower --dpo-learning-rate."
            )

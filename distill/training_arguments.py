"""The settings of transformers' Trainer for a run: our defaults, then whatever the user set by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xeco_convert.errors import OptionError, first_line

from .options import DistillOptions

_REFERENCE_RATE, _REFERENCE_HIDDEN, _HIGHEST_RATE = 8e-5, 2048, 5e-4
# One setting by its names in newer and older releases of transformers.
_RENAMED = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
_MEASUREMENTS = 10  # and as many checkpoints, in a run, where the user does not say


def learning_rate(options: DistillOptions, hidden_size: int) -> float:
    """The published 8e-5 of a hidden_size of 2048 (X-EcoMLA, section 4), in inverse proportion to the width (as Adam wants
    it: Tensor Programs V, arXiv 2203.03466), at most 5e-4 (benchmarks: more spoils a good start before it heals)."""
    if options.learning_rate is not None:
        return options.learning_rate
    return min(_HIGHEST_RATE, _REFERENCE_RATE * _REFERENCE_HIDDEN / hidden_size)


def accumulation(options: DistillOptions) -> int:
    """Batches whose gradients a step adds up."""
    return int(options.trainer.get("gradient_accumulation_steps", 1))


def batch_rows(options: DistillOptions) -> int:
    """Rows of a batch on each device."""
    return int(options.trainer.get("per_device_train_batch_size", options.batch_size))


def keeps_few_activations(options: DistillOptions) -> bool:
    """Whether activations are computed again in the backward pass."""
    return any(options.trainer.get(name) for name in _RENAMED[0])


def training_arguments(
    kind: type[Any],
    options: DistillOptions,
    folder: Path,
    *,
    max_steps: int,
    rate: float,
    fsdp_layers: list[str] | None,
    on_cuda: bool,
    **fields: Any,
) -> Any:
    """TrainingArguments (or the subclass `kind`) for one stage. `fsdp_layers`: decoder layer classes, where FSDP2 shards;
    `fields`: further fields of that class, which the stage sets itself.

    Raises `OptionError` for names that transformers does not have and values that it refuses.
    """
    interval = max(1, math.ceil(max_steps / _MEASUREMENTS))
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(math.ceil(max_steps / 10), max(10, math.ceil(max_steps / 100))),
        "adam_beta2": 0.95,
        "logging_steps": max(1, min(10, interval)),
        "eval_strategy": "steps",
        "eval_steps": interval,
        "save_strategy": "steps",
        "save_steps": interval,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "report_to": "none",
        "bf16": on_cuda,
        "use_cpu": not on_cuda,
        "seed": options.seed,
        "data_seed": options.seed,
        "disable_tqdm": True,
        "log_level": "error",
        "ddp_timeout": 24 * 3600,  # the others wait while one samples, packs or writes
        **fields,
    }
    if options.patience is not None and "eval_strategy" not in fields:
        chosen |= {"load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": False}
    if fsdp_layers is not None:
        chosen |= {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": fsdp_layers},
        }
    settings = {name: value for name, value in options.trainer.items() if "." not in name}  # dpo.NAME is not for kl
    settings = _as_called_here(kind, settings)
    _check_names(kind, settings)
    try:
        return kind(**{**chosen, **settings})
    except (TypeError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise OptionError(f"--trainer: transformers refuses these settings ({reason}); change them.") from None


def _as_called_here(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the names of this transformers; a default that TRL sets under the older name as well."""
    defaults, settings = {item.name: item.default for item in dataclasses.fields(kind)}, dict(given)
    for newer, older in _RENAMED:
        values = [settings.pop(name) for name in (newer, older) if name in settings]
        if not values and newer in defaults and defaults[older] is not None:
            values = [defaults[older]]
        if values:
            settings[newer if newer in defaults else older] = values[0]
    return settings


def _check_names(kind: type[Any], given: Mapping[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see transformers' TrainingArguments."
            raise OptionError(f"--trainer {name}: transformers' {kind.__name__} has no such setting{hint}")

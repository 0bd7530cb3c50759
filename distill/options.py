"""The options of a healing run: one field is one flag, one help line, one key of a YAML recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.errors import OptionError
from xeco_convert.settings import choices_of, default_of, flag_of, option, option_fields, require

from .losses.loss import LOSSES, Loss, loss_from, loss_options

STAGES = ("layers", "kl", "dpo")
TRAINED = ("attention", "norms", "all")
LAYER_INPUTS = ("healed", "source")
SHARDINGS = ("fsdp2", "ddp")
# Settings of transformers' TrainingArguments that the run decides itself; each with the option to use instead.
OWN_ARGUMENTS = {
    "output_dir": "--output",
    "remove_unused_columns": "nothing: the run needs all columns",
    "max_steps": "--budget-tokens",
    "num_train_epochs": "--budget-tokens",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device cpu",
    "do_train": "--stages",
    "do_eval": "--held-out-tokens",
    "label_names": "nothing: labels are made from the data",
    "save_strategy": "--trainer save_steps=N",
    "save_only_model": "nothing: a run could not be continued from weights alone",
    "save_total_limit": "nothing: the last two checkpoints are kept until the run ends",
    "resume_from_checkpoint": "nothing: an interrupted run is continued by the same command",
    "push_to_hub": "`hf upload` once the run is done",
    "load_best_model_at_end": "--patience",
    "metric_for_best_model": "--patience",
}


@dataclass(frozen=True, kw_only=True, init=False)
class DistillOptions:
    """What `xeco-distill OUT` does, made of options by their names: `DistillOptions(budget_tokens=100_000, loss="jsd")`.

    Fields are the options that every run has; those of the loss are the fields of `objective`. `None` means: chosen by the
    program, and said before it starts. Raises `OptionError` on construction for values that are wrong whatever the model is,
    and `TypeError` for names that are no options.
    """

    objective: Loss

    stages: str | None = option(
        "Stages in their order: layers (each layer regressed on the source's), kl (distillation), dpo. [layers,kl; and dpo "
        "where --preferences is given]",
        metavar="LIST",
    )
    teacher: str | None = option(
        "Model to learn from: folder or hub id, same vocabulary. [the source recorded in OUT]", metavar="MODEL"
    )
    teacher_revision: str | None = option("Branch, tag or commit of --teacher on the hub.", metavar="REV")
    data: str | None = option(
        "Text to train on: .txt, .md, .jsonl, .json, .csv (also .gz), .parquet, or a data set (name:split), with "
        "text, messages, or prompt and completion. [sampled from the teacher]",
        metavar="TEXT",
    )
    assistant_only: bool = option("Learn from assistant turns and completions only, not from what they answer.", False)
    preferences: str | None = option("Data for dpo: records with prompt, chosen and rejected.", metavar="TEXT")
    seq_length: int | None = option(
        "Tokens of a training row. [1024, or the model's longest context where that is shorter]", metavar="N"
    )
    sample_tokens: int | None = option(
        "Tokens to sample from the teacher; fewer than the budget are seen again. [the budget]", metavar="N"
    )
    sample_cache: str | None = option(
        "Keep what is sampled here, for other runs with the same teacher. [the work folder]", metavar="DIR"
    )
    held_out_tokens: int = option("Tokens never trained on, for measuring.", 16384, metavar="N")
    budget_tokens: int | None = option("Tokens to train on in the kl stage. [1000000]", metavar="N")
    budget_minutes: float | None = option(
        "Time for the kl stage; without --budget-tokens it decides how many tokens are trained on.", metavar="M"
    )
    train: str = option(
        "What the kl stage trains: attention (the MLA layers), norms (and all norms), or all.", "all", choices=TRAINED
    )
    loss: str = option(
        "Loss of the kl stage; the direction is that of KL(teacher ‖ student) for forward-kl.",
        "forward-kl",
        choices=LOSSES.names,
    )
    ce_weight: float = option("Share of cross entropy with the data in the loss.", 0.0, metavar="W")
    top_k: int | None = option(
        "Keep the teacher's K most likely tokens on disk once, and train from them without the teacher in memory.",
        metavar="K",
    )
    learning_rate: float | None = option(
        "Peak learning rate of the kl stage. [8e-5 · 2048 / hidden_size, at most 5e-4]", metavar="LR"
    )
    batch_size: int = option("Rows of a step on each device.", 4, metavar="N")
    balance: bool = option("Settle the free scales between MLA factors before training; changes no output.", True)
    layer_tokens: int = option("layers: tokens to regress on.", 131072, metavar="N")
    layer_steps: int = option("layers: steps for each layer.", 300, metavar="N")
    layer_minutes: float | None = option("layers: time for all layers together.", metavar="M")
    layer_inputs: str = option(
        "layers: what a layer sees while it is fitted: healed (the output of the healed layers below), or source.",
        "healed",
        choices=LAYER_INPUTS,
    )
    dpo_beta: float = option("dpo: strength of the pull to the model before it.", 0.01, metavar="B")
    dpo_learning_rate: float = option("dpo: peak learning rate.", 5e-7, metavar="LR")
    patience: int | None = option(
        "Stop after this many measurements without a better held-out KL, and keep the best.", metavar="N"
    )
    device: str | None = option("cpu, or cuda. [cuda where there is one]", choices=("cpu", "cuda"))
    sharding: str = option(
        "On several devices: fsdp2 (student and teacher sharded) or ddp.", "fsdp2", choices=SHARDINGS
    )
    seed: int = option("Seed of sampling, order and regression.", 0, metavar="N")
    output: str | None = option("Write the healed model here instead of into OUT.", metavar="DIR")
    overwrite: bool = option("Replace --output if it exists.", False)
    keep_original: bool = option("Keep the weights before healing, in OUT.before-healing.", True)
    work_dir: str | None = option("Where an unfinished run is kept. [OUT.healing]", metavar="DIR")
    restart: bool = option("Throw an unfinished run away and begin again.", False)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        known = self.fields()
        for name in values:
            if name not in known and name != "trainer":
                raise TypeError(f"DistillOptions got an unexpected keyword argument '{name}'")
        for name, item in option_fields(type(self)).items():
            object.__setattr__(self, name, values.get(name, default_of(item)))
        object.__setattr__(self, "trainer", values.get("trainer", {}))
        self._check_choices()
        object.__setattr__(self, "objective", loss_from(self.loss, values))
        self._check()

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options with a flag, by name: those of every run, and behind --loss those of the losses."""
        fields: dict[str, dataclasses.Field[Any]] = {}
        for name, item in option_fields(cls).items():
            fields[name] = item
            if name == "loss":
                fields |= loss_options()
        return fields

    def values(self) -> dict[str, Any]:
        """The value of every option by name, `trainer` with them; the default for those that the loss does not have."""
        own = {name: getattr(self, name) for name in option_fields(type(self))}
        own |= {name: getattr(self.objective, name) for name in option_fields(type(self.objective))}
        return {name: own.get(name, default_of(item)) for name, item in self.fields().items()} | {
            "trainer": dict(self.trainer)
        }

    def replace(self, **changes: Any) -> DistillOptions:
        """The same options but for some."""
        return DistillOptions(**self.values() | changes)

    def _check(self) -> None:
        stages = self.stage_list
        if "dpo" in stages and self.preferences is None:
            raise OptionError("--stages: dpo needs data; add --preferences FILE, or leave dpo out.")
        for flag, value, low in (
            ("--seq-length", self.seq_length, 2),
            ("--batch-size", self.batch_size, 1),
            ("--sample-tokens", self.sample_tokens, 1),
            ("--held-out-tokens", self.held_out_tokens, 1),
            ("--budget-tokens", self.budget_tokens, 1),
            ("--layer-tokens", self.layer_tokens, 1),
            ("--layer-steps", self.layer_steps, 1),
            ("--top-k", self.top_k, 1),
            ("--patience", self.patience, 1),
        ):
            require(value is None or value >= low, flag, f"a whole number of at least {low}", value)
        self._check_reals()
        self._check_loss()
        self._check_trainer()

    @property
    def stage_list(self) -> tuple[str, ...]:
        """The stages, in their order."""
        if self.stages is None:
            return ("layers", "kl") + (("dpo",) if self.preferences is not None else ())
        stages = tuple(name.strip() for name in str(self.stages).split(","))
        known = [name for name in STAGES if name in stages]
        if tuple(known) != stages:
            raise OptionError(
                f"--stages: expected some of {', '.join(STAGES)}, once each and in this order, found {self.stages!r}."
            )
        return stages

    @property
    def tokens(self) -> int:
        """Tokens to train on, where the time does not decide."""
        return 1_000_000 if self.budget_tokens is None else self.budget_tokens

    def _check_choices(self) -> None:
        for name, item in option_fields(type(self)).items():
            choices, value = choices_of(item), getattr(self, name)
            if choices and value is not None:
                require(value in choices, flag_of(name), f"one of {', '.join(choices)}", value)

    def _check_reals(self) -> None:
        for flag, value in (
            ("--budget-minutes", self.budget_minutes),
            ("--layer-minutes", self.layer_minutes),
            ("--learning-rate", self.learning_rate),
            ("--dpo-learning-rate", self.dpo_learning_rate),
            ("--dpo-beta", self.dpo_beta),
        ):
            require(value is None or value > 0, flag, "a positive number", value)
        require(0 <= self.ce_weight <= 1, "--ce-weight", "a share from 0 to 1", self.ce_weight)

    def _check_loss(self) -> None:
        if self.top_k is not None and self.objective.of_top_k() is None:
            raise OptionError(
                "--top-k: only with --loss forward-kl at --temperature 1, found "
                f"{self.loss} at {self.objective.temperature:g}; leave one of them out."
            )

    def _check_trainer(self) -> None:
        for name in (name.removeprefix("dpo.") for name in self.trainer):
            if name in OWN_ARGUMENTS:
                raise OptionError(f"--trainer {name}: this is set by the run; use {OWN_ARGUMENTS[name]}.")


def checked_mapping(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of a YAML mapping as fields: dashes or underscores, numbers such as 8e-5 that YAML reads as text as numbers."""
    known = {name: str(item.type) for name, item in DistillOptions.fields().items()} | {"trainer": "Mapping"}
    fields = {str(key).replace("-", "_"): value for key, value in data.items()}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise OptionError(
            f"{where}: unknown keys {', '.join(unknown)}; expected options of xeco-distill, or trainer: for those of "
            "transformers' TrainingArguments."
        )
    for name, value in fields.items():
        fields[name] = _typed(name, value, known[name], where)
    return fields


def _typed(name: str, value: Any, kind: str, where: str) -> Any:
    if value is None:
        return None
    if name == "trainer":
        if not isinstance(value, Mapping):
            raise OptionError(f"{where}: trainer: expected a mapping of names to values, found {value!r}.")
        return dict(value)
    if name == "stages" and isinstance(value, list):
        return ",".join(map(str, value))
    expected = kind.removesuffix(" | None")
    try:
        if expected == "bool":
            good = isinstance(value, bool)
            return value if good else _refuse(name, value, expected, where)
        if expected == "int":
            return int(value) if float(value) == int(float(value)) else _refuse(name, value, expected, where)
        return float(value) if expected == "float" else str(value)
    except (TypeError, ValueError):
        return _refuse(name, value, expected, where)


def _refuse(name: str, value: Any, expected: str, where: str) -> Any:
    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    raise OptionError(f"{where}: {name}: expected {words.get(expected, expected)}, found {value!r}; change the value.")

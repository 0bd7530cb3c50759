"""The options of a healing run: one field is one flag, one help line, one key of a YAML recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.errors import OptionError

STAGES = ("layers", "kl", "dpo")
TRAINED = ("attention", "norms", "all")
LOSSES = ("forward-kl", "reverse-kl", "jsd", "cross-entropy")
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


def _option(help_text: str, default: Any = None, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What `xeco-distill OUT` does. `None` means: chosen by the program, and said before it starts.

    Raises `OptionError` on construction for values that are wrong whatever the model is.
    """

    stages: str | None = _option(
        "Stages in their order: layers (each layer regressed on the source's), kl (distillation), dpo. [layers,kl; and dpo "
        "where --preferences is given]",
        metavar="LIST",
    )
    teacher: str | None = _option(
        "Model to learn from: folder or hub id, same vocabulary. [the source recorded in OUT]", metavar="MODEL"
    )
    teacher_revision: str | None = _option("Branch, tag or commit of --teacher on the hub.", metavar="REV")
    data: str | None = _option(
        "Text to train on: .txt, .md, .jsonl, .json, .csv (also .gz), .parquet, or a data set (name:split), with "
        "text, messages, or prompt and completion. [sampled from the teacher]",
        metavar="TEXT",
    )
    assistant_only: bool = _option("Learn from assistant turns and completions only, not from what they answer.", False)
    preferences: str | None = _option("Data for dpo: records with prompt, chosen and rejected.", metavar="TEXT")
    seq_length: int | None = _option(
        "Tokens of a training row. [1024, or the model's longest context where that is shorter]", metavar="N"
    )
    sample_tokens: int | None = _option(
        "Tokens to sample from the teacher; fewer than the budget are seen again. [the budget]", metavar="N"
    )
    sample_cache: str | None = _option(
        "Keep what is sampled here, for other runs with the same teacher. [the work folder]", metavar="DIR"
    )
    held_out_tokens: int = _option("Tokens never trained on, for measuring.", 16384, metavar="N")
    budget_tokens: int | None = _option("Tokens to train on in the kl stage. [1000000]", metavar="N")
    budget_minutes: float | None = _option(
        "Time for the kl stage; without --budget-tokens it decides how many tokens are trained on.", metavar="M"
    )
    train: str = _option(
        "What the kl stage trains: attention (the MLA layers), norms (and all norms), or all.", "all", choices=TRAINED
    )
    loss: str = _option(
        "Loss of the kl stage; the direction is that of KL(teacher ‖ student) for forward-kl.",
        "forward-kl",
        choices=LOSSES,
    )
    temperature: float = _option("Temperature of both softmaxes in the loss.", 1.0, metavar="T")
    jsd_beta: float = _option("jsd: weight of the teacher in the mixture, between 0 and 1.", 0.5, metavar="B")
    ce_weight: float = _option("Share of cross entropy with the data in the loss.", 0.0, metavar="W")
    top_k: int | None = _option(
        "Keep the teacher's K most likely tokens on disk once, and train from them without the teacher in memory.",
        metavar="K",
    )
    learning_rate: float | None = _option(
        "Peak learning rate of the kl stage. [8e-5 · 2048 / hidden_size, at most 5e-4]", metavar="LR"
    )
    batch_size: int = _option("Rows of a step on each device.", 4, metavar="N")
    balance: bool = _option("Settle the free scales between MLA factors before training; changes no output.", True)
    layer_tokens: int = _option("layers: tokens to regress on.", 131072, metavar="N")
    layer_steps: int = _option("layers: steps for each layer.", 300, metavar="N")
    layer_minutes: float | None = _option("layers: time for all layers together.", metavar="M")
    layer_inputs: str = _option(
        "layers: what a layer sees while it is fitted: healed (the output of the healed layers below), or source.",
        "healed",
        choices=LAYER_INPUTS,
    )
    dpo_beta: float = _option("dpo: strength of the pull to the model before it.", 0.01, metavar="B")
    dpo_learning_rate: float = _option("dpo: peak learning rate.", 5e-7, metavar="LR")
    patience: int | None = _option(
        "Stop after this many measurements without a better held-out KL, and keep the best.", metavar="N"
    )
    device: str | None = _option("cpu, or cuda. [cuda where there is one]", choices=("cpu", "cuda"))
    sharding: str = _option(
        "On several devices: fsdp2 (student and teacher sharded) or ddp.", "fsdp2", choices=SHARDINGS
    )
    seed: int = _option("Seed of sampling, order and regression.", 0, metavar="N")
    output: str | None = _option("Write the healed model here instead of into OUT.", metavar="DIR")
    overwrite: bool = _option("Replace --output if it exists.", False)
    keep_original: bool = _option("Keep the weights before healing, in OUT.before-healing.", True)
    work_dir: str | None = _option("Where an unfinished run is kept. [OUT.healing]", metavar="DIR")
    restart: bool = _option("Throw an unfinished run away and begin again.", False)
    trainer: Mapping[str, Any] = field(default_factory=dict, metadata={"help": ""})

    def __post_init__(self) -> None:
        self._check_choices()
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
            _require(value is None or value >= low, flag, f"a whole number of at least {low}", value)
        self._check_reals()
        self._check_loss()
        self._check_trainer()

    @property
    def stage_list(self) -> tuple[str, ...]:
        """The stages, in their order."""
        if self.stages is None:
            return ("layers", "kl") + (("dpo",) if self.preferences is not None else ())
        found = tuple(name.strip() for name in str(self.stages).split(","))
        known = [name for name in STAGES if name in found]
        if tuple(known) != found:
            raise OptionError(
                f"--stages: expected some of {', '.join(STAGES)}, once each and in this order, found {self.stages!r}."
            )
        return found

    @property
    def tokens(self) -> int:
        """Tokens to train on, where the time does not decide."""
        return 1_000_000 if self.budget_tokens is None else self.budget_tokens

    def _check_choices(self) -> None:
        for item in dataclasses.fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value is not None:
                _require(value in choices, _flag(item.name), f"one of {', '.join(choices)}", value)

    def _check_reals(self) -> None:
        for flag, value in (
            ("--budget-minutes", self.budget_minutes),
            ("--layer-minutes", self.layer_minutes),
            ("--temperature", self.temperature),
            ("--learning-rate", self.learning_rate),
            ("--dpo-learning-rate", self.dpo_learning_rate),
            ("--dpo-beta", self.dpo_beta),
        ):
            _require(value is None or value > 0, flag, "a positive number", value)
        _require(0 <= self.ce_weight <= 1, "--ce-weight", "a share from 0 to 1", self.ce_weight)
        _require(0 < self.jsd_beta < 1, "--jsd-beta", "a number between 0 and 1", self.jsd_beta)

    def _check_loss(self) -> None:
        if self.top_k is None:
            return
        if self.loss != "forward-kl" or self.temperature != 1.0:
            raise OptionError(
                "--top-k: only with --loss forward-kl at --temperature 1, found "
                f"{self.loss} at {self.temperature:g}; leave one of them out."
            )

    def _check_trainer(self) -> None:
        for name in (name.removeprefix("dpo.") for name in self.trainer):
            if name in OWN_ARGUMENTS:
                raise OptionError(f"--trainer {name}: this is set by the run; use {OWN_ARGUMENTS[name]}.")

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], where: str) -> DistillOptions:
        """Options from the mapping of a YAML file, `where` naming it in errors. Raises `OptionError`."""
        return cls(**checked_mapping(data, where))


def checked_mapping(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of a YAML mapping as fields: dashes or underscores, numbers such as 8e-5 that YAML reads as text as numbers."""
    known = {item.name: str(item.type) for item in dataclasses.fields(DistillOptions)}
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
    wanted = kind.removesuffix(" | None")
    try:
        if wanted == "bool":
            good = isinstance(value, bool)
            return value if good else _refuse(name, value, wanted, where)
        if wanted == "int":
            return int(value) if float(value) == int(float(value)) else _refuse(name, value, wanted, where)
        return float(value) if wanted == "float" else str(value)
    except (TypeError, ValueError):
        return _refuse(name, value, wanted, where)


def _refuse(name: str, value: Any, wanted: str, where: str) -> Any:
    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    raise OptionError(f"{where}: {name}: expected {words.get(wanted, wanted)}, found {value!r}; change the value.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require(holds: bool, flag: str, expected: str, found: object) -> None:
    if not holds:
        raise OptionError(f"{flag}: expected {expected}, found {found}; change the value.")

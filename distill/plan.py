"""What a healing run will do, from configurations and headers alone: stages, sizes, time. What can be refused is, here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xeco_convert.errors import OptionError

from .attention import attention_prefixes
from .data.preparation import RowRequest
from .options import DistillOptions
from .pair import ModelPair, open_pair
from .training_arguments import accumulation, batch_rows, keeps_few_activations, learning_rate

_ACTIVATIONS_PER_LAYER = (
    34  # hidden-sized tensors kept per token for backward (Korthikanti et al., arXiv 2205.05198, eq. 1)
)
_EFFICIENCY = 0.4  # of a plain matrix product: attention, elementwise work, reading of weights


@dataclass(frozen=True, kw_only=True)
class HealingPlan(ModelPair):
    """The stages that will run on student and teacher, and notes on what was chosen or left out."""

    options: DistillOptions
    stages: tuple[str, ...]
    notes: tuple[str, ...]

    def step_tokens(self, world: int) -> int:
        """Tokens of a step on all devices."""
        return batch_rows(self.options) * accumulation(self.options) * world * self.seq_length

    def rows(self, world: int) -> RowRequest:
        """The rows to train on (sampled ones are at least one step's) and to measure on."""
        options, length = self.options, self.seq_length
        tokens = options.tokens if options.sample_tokens is None else options.sample_tokens
        return RowRequest(
            pair=self,
            training=max(math.ceil(tokens / length), self.step_tokens(world) // length),
            held_out=max(1, math.ceil(options.held_out_tokens / length)),
            data=options.data,
            assistant_only=options.assistant_only,
            sample_cache=options.sample_cache,
            seed=options.seed,
        )


def make_healing_plan(folder: Path, options: DistillOptions) -> HealingPlan:
    """Check checkpoint, teacher and options against each other. Raises as `open_pair` does."""
    pair = open_pair(folder, options.teacher, options.teacher_revision, options.seq_length)
    stages, notes = options.stage_list, []
    if "layers" in stages and not pair.teacher.is_source:
        if options.stages is not None:
            raise OptionError(
                "--stages: layers needs the model that OUT was converted from as the teacher, found "
                f"{pair.teacher.name}; leave layers out, or --teacher."
            )
        stages = tuple(stage for stage in stages if stage != "layers")
        notes.append("no layer-wise stage: the teacher is not the model that OUT was converted from")
    return HealingPlan(**vars(pair), options=options, stages=stages, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on each device and seconds of the kl stage; rough, for deciding before a run."""

    student_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    activation_bytes: int
    seconds: float
    disk_bytes: int
    trained: int
    parameters: int

    @property
    def memory_bytes(self) -> int:
        return self.student_bytes + self.optimizer_bytes + self.teacher_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers stored in student and teacher, and the shape that activations follow from."""

    parameters: int
    attention: int
    norms: int
    teacher: int
    teacher_bytes: int
    hidden_size: int
    num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, plan: HealingPlan) -> Sizes:
        """From headers."""
        count = {name: math.prod(header.shape) for name, header in plan.student.headers.items()}
        config, teacher = plan.student.config, plan.teacher.index
        converted = attention_prefixes(plan.student)
        return cls(
            parameters=sum(count.values()),
            attention=sum(number for name, number in count.items() if name.startswith(converted)),
            norms=sum(n for name, n in count.items() if "norm" in name and not name.startswith(converted)),
            teacher=sum(math.prod(header.shape) for header in teacher.headers.values()),
            teacher_bytes=sum(header.num_bytes for header in teacher.headers.values()),
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
        )


def estimate(sizes: Sizes, options: DistillOptions, seq_length: int, *, world: int, flops: float) -> Estimate:
    """What the kl stage takes on each of `world` devices that do `flops` floating-point operations a second.

    Student in float32 with gradients and two Adam moments for what is trained; the teacher as stored; activations by
    Korthikanti et al.; logits of one chunk. Time: 2 operations per weight and token forward, 4 backward.
    """
    trained = {
        "attention": sizes.attention,
        "norms": sizes.attention + sizes.norms,
        "all": sizes.parameters,
    }[options.train]
    sharded = world if world > 1 and options.sharding == "fsdp2" else 1
    tokens = batch_rows(options) * seq_length
    activations = tokens * sizes.hidden_size * _ACTIVATIONS_PER_LAYER * sizes.num_layers * 2
    if keeps_few_activations(options):
        activations = tokens * sizes.hidden_size * (sizes.num_layers * 2 + _ACTIVATIONS_PER_LAYER * 2)
    logits = 2 * min(2**24, tokens * sizes.vocab_size) * 4
    per_token = 2 * sizes.teacher * (options.top_k is None) + 4 * sizes.parameters + 2 * trained
    return Estimate(
        student_bytes=4 * sizes.parameters // sharded,
        optimizer_bytes=12 * trained // sharded,
        teacher_bytes=0 if options.top_k is not None else sizes.teacher_bytes // sharded,
        activation_bytes=activations + logits,
        seconds=options.tokens * per_token / (flops * _EFFICIENCY * world),
        disk_bytes=2 * (4 * sizes.parameters + 8 * trained) + 9 * options.tokens,
        trained=trained,
        parameters=sizes.parameters,
    )


def measured_flops(device: torch.device) -> float:
    """Floating-point operations a second of matrix products here: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        began = time.monotonic()
        product = left @ left
        float(product[0, 0])  # waits for the device
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best


def describe(plan: HealingPlan, sizes: Estimate, world: int) -> list[str]:
    """The plan in lines for people."""
    options = plan.options
    data = "text sampled from the teacher" if options.data is None else options.data
    lines = [
        f"student: {plan.student.folder} ({plan.student.config['model_type']}, {sizes.parameters:,} parameters, KV cache "
        f"{plan.kv_bytes_after / max(1, plan.kv_bytes_before):.1%} of the source's)",
        f"teacher: {plan.teacher.name}" + (" (the source)" if plan.teacher.is_source else ""),
        f"stages: {', '.join(plan.stages)}",
    ]
    if "kl" in plan.stages:
        rate = learning_rate(options, plan.student.config["hidden_size"])
        budget = f"{options.tokens:,} tokens"
        if options.budget_minutes is not None:
            limit = f"{options.budget_minutes:g} minutes"
            budget = limit if options.budget_tokens is None else f"{budget}, at most {limit}"
        lines.append(
            f"kl: {options.loss}, {budget} of {data} in rows of {plan.seq_length}, {plan.step_tokens(world):,} tokens a step, "
            f"learning rate {rate:.2g}, training {options.train} ({sizes.trained:,} parameters)"
        )
    lines += [f"note: {note}" for note in plan.notes]
    return lines


def describe_estimate(sizes: Estimate, device: torch.device, world: int) -> list[str]:
    """Memory and time in lines for people."""
    parts = {
        "student": sizes.student_bytes,
        "gradients and optimizer": sizes.optimizer_bytes,
        "teacher": sizes.teacher_bytes,
        "activations and logits": sizes.activation_bytes,
    }
    detail = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    where = f"{world} x {device.type}" if world > 1 else device.type
    return [
        f"memory: about {sizes.memory_bytes / 2**30:.2f} GiB on each device ({detail})",
        f"time of the kl stage: about {_duration(sizes.seconds)} on {where}, by a matrix product timed just now",
        f"disk while it runs: about {sizes.disk_bytes / 1e9:.2f} GB",
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

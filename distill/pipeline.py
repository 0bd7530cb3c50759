"""A healing run on one screen: plan -> rows -> stages -> checkpoint -> measure -> put in process."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import OptionError
from xeco_convert.pretrained import load_causal_lm
from xeco_convert.source import open_source

from .callbacks import Report
from .data import PackedRows
from .data.preparation import prepare_rows
from .errors import HealingError
from .evaluation.quality import measure_quality
from .options import DistillOptions
from .pair import refuse_foreign_folder
from .plan import HealingPlan, make_healing_plan
from .process import ProcessContext, open_process
from .publish import check_place, put_in_place, record, recover, save_overlay, write_checkpoint
from .resume import RunFolder, fingerprint
from .sharding import shard
from .stages.distillation import DistillationStage
from .stages.layerwise import LayerwiseStage, same_outside_attention
from .teacher import Teacher, check_head


@dataclass(frozen=True, kw_only=True)
class HealingReport:
    """What a run did: quality before and after on held-out text, and what each stage says of itself."""

    output: str
    stages: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    tokens: int
    teacher: str
    data: str
    options: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)


def heal(
    folder: str | Path, options: DistillOptions | None = None, *, report: Report | None = None, **fields: Any
) -> HealingReport:
    """Heal the converted checkpoint in `folder`; options as `DistillOptions` or as its fields.

    Started by torchrun, all processes take part. Raises the errors of xeco_convert.errors and xeco_distill.errors, each
    with one sentence; then `folder` is as it was, and what was reached is kept in the work folder.
    """
    if options is not None and fields:
        raise OptionError(f"heal: give options either as an object or as fields, not both (found {', '.join(fields)}).")
    options = options if options is not None else DistillOptions(**fields)
    folder = Path(os.path.abspath(folder))
    process = open_process(options.device)
    work = RunFolder(work_place(folder, options))
    if process.is_main:
        recover(folder, work.path("result"))
    process.barrier()
    refuse_foreign_folder(folder)
    output = None if options.output is None else Path(os.path.abspath(options.output))
    check_place(folder, output, overwrite=options.overwrite, keep=options.keep_original)
    plan = make_healing_plan(folder, options)
    if process.is_main:
        work.open(
            fingerprint(plan.student, plan.teacher.fingerprint(), options, process.world), restart=options.restart
        )
    process.barrier()
    quiet: Report = lambda what, share, figures: None  # noqa: E731
    try:
        return _Run(plan, work, process, report if report is not None and process.is_main else quiet).run(output)
    except OSError as error:
        reason = error.strerror or str(error)
        raise HealingError(
            f"{error.filename or work.folder}: {reason}; {folder} is as it was, and what was done so far is kept in "
            f"{work.folder}. Free some space, then the same command continues."
        ) from None


def work_place(folder: Path, options: DistillOptions) -> Path:
    """The work folder of a run."""
    if options.work_dir is not None:
        return Path(os.path.abspath(options.work_dir))
    return folder.with_name(f"{folder.name}.healing")


class _Run:
    """One run: its plan, its folder, its process."""

    def __init__(self, plan: HealingPlan, work: RunFolder, process: ProcessContext, report: Report) -> None:
        self._plan, self._work, self._process, self._report = plan, work, process, report
        self._options = plan.options
        self._teacher: Teacher | None = None
        self._began = time.monotonic()

    def run(self, output: Path | None) -> HealingReport:
        """All of it."""
        train, held_out = prepare_rows(
            self._plan.rows(self._process.world), self._work, self._process, self._sampled_teacher, self._report
        )
        before = self._measured("before.json", self._plan.student.folder, held_out)
        reached, done = self._plan.student.folder, {}
        steps: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
            "layers": lambda start, result: self._layers(start, result, train),
            "kl": lambda start, result: self._distil(start, result, train, held_out),
            "dpo": self._prefer,
        }
        for stage in self._plan.stages:
            result = self._work.path(f"done/{stage}")
            facts = self._work.read_json(f"done/{stage}.json")
            if facts is None:
                facts = steps[stage](reached, result)
                if self._process.is_main:
                    self._work.write_json(f"done/{stage}.json", facts)
                    _forget(self._work, stage, reached)
                self._process.barrier()
            done[stage] = facts
            reached = result if result.is_dir() else reached
        return self._finish(reached, before, done, held_out, output)

    def _teacher_model(self) -> Teacher:
        """The teacher on this device, sharded where the student is; loaded on first use."""
        if self._teacher is None:
            dtype: torch.dtype | str = "auto" if self._process.device.type == "cuda" else torch.float32
            self._report("loading the teacher", 0.0, {})
            model = load_causal_lm(self._plan.teacher.folder, dtype)
            check_head(model, f"teacher {self._plan.teacher.name}")
            model = model.eval().requires_grad_(False)
            if self._process.shards(self._options.sharding):
                shard(model, self._process.device, root=model.get_decoder())
            else:
                model.to(self._process.device)
            self._teacher = Teacher(model, self._plan.student.config["vocab_size"])
        return self._teacher

    def _sampled_teacher(self) -> Teacher:
        """The teacher for sampling: whole on this device, since processes that generate do not run in step."""
        if not self._process.shards(self._options.sharding):
            return self._teacher_model()
        model = load_causal_lm(self._plan.teacher.folder, "auto").to(self._process.device).eval()
        return Teacher(model, self._plan.student.config["vocab_size"])

    def _release_teacher(self) -> None:
        """Free its memory; it is loaded again when it is needed again."""
        self._teacher = None
        if self._process.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, name: str, folder: Path, held_out: PackedRows) -> dict[str, Any]:
        """Quality of a checkpoint as it is stored, kept under a name."""
        facts = self._work.read_json(name)
        if facts is None:
            what = f"measuring {'before' if name.startswith('before') else 'after'}"
            self._report(what, 0.0, {})
            dtype: torch.dtype | str = "auto" if self._process.device.type == "cuda" else torch.float32
            student = load_causal_lm(folder, dtype).to(self._process.device).eval()
            tell: Callable[[float], None] = lambda share: self._report(what, share, {})  # noqa: E731
            facts = measure_quality(self._teacher_model(), student, held_out, on_progress=tell).to_dict()
            tell(1.0)
            if self._process.is_main:
                self._work.write_json(name, facts)
        return facts

    def _layers(self, start: Path, result: Path, train: PackedRows) -> dict[str, Any]:
        source = open_source(self._plan.teacher.index).index
        different = same_outside_attention(CheckpointIndex.open(start), source)
        if different is not None:
            if self._options.stages is not None:
                raise OptionError(
                    f"--stages: layers aims at the source with the source's other weights, but {different} differs from it "
                    "(OUT was trained already); leave layers out."
                )
            return {"skipped": f"{different} differs from the source's: OUT was trained already"}
        shared = self._options.layer_inputs == "source"
        share = (self._process.rank, self._process.world) if shared else (0, 1)
        stage = LayerwiseStage(
            CheckpointIndex.open(start),
            source,
            train,
            self._work.path("layers"),
            self._options,
            self._process.device,
            share=share,
        )
        if shared or self._process.is_main:
            stage.run(self._report)
        self._process.barrier()
        if self._process.is_main:
            save_overlay(load_causal_lm(start, torch.float32), stage.tensors(), result)
        self._process.barrier()
        return stage.result().to_dict()

    def _distil(self, start: Path, result: Path, train: PackedRows, held_out: PackedRows) -> dict[str, Any]:
        student = load_causal_lm(start, torch.float32)
        stage = DistillationStage(
            student,
            self._teacher_model,
            (train, held_out),
            self._work,
            self._options,
            self._process,
            self._report,
            release_teacher=self._release_teacher,
        )
        return stage.run(result)

    def _prefer(self, start: Path, result: Path) -> dict[str, Any]:
        from .stages.preference import prefer

        self._release_teacher()
        return prefer(start, result, self._plan, self._work, self._process, self._report)

    def _finish(
        self, reached: Path, before: dict[str, Any], done: dict[str, Any], held_out: PackedRows, output: Path | None
    ) -> HealingReport:
        """Write, measure what was written, put it in process."""
        result = self._work.path("result")
        if self._process.is_main:
            self._report("writing", 0.0, {})
            write_checkpoint(self._plan.student, CheckpointIndex.open(reached), result)
        self._process.barrier()
        after = self._measured("after.json", result, held_out)
        target = self._plan.student.folder if output is None else output
        report = HealingReport(
            output=str(target),
            stages={stage: _without_history(facts) for stage, facts in done.items()},
            before=before,
            after=after,
            tokens=int(done.get("kl", {}).get("tokens", 0)),
            teacher=self._plan.teacher.name,
            data="text sampled from the teacher" if self._options.data is None else self._options.data,
            options=changed_options(self._options),
            seconds=time.monotonic() - self._began,
        )
        if self._process.is_main:
            record(result, {**report.to_dict(), "history": done.get("kl", {}).get("history", []), "output": None})
            put_in_place(result, self._plan.student.folder, output, keep=self._options.keep_original)
            self._work.remove()
        self._process.barrier()
        return report


def changed_options(options: DistillOptions) -> dict[str, Any]:
    """The options that are not their defaults, and say something about the result."""
    silent = ("output", "overwrite", "keep_original", "work_dir", "restart", "sample_cache", "device")
    default = DistillOptions().values()
    return {key: value for key, value in options.values().items() if value != default[key] and key not in silent}


def _forget(work: RunFolder, stage: str, start: Path) -> None:
    """Free what the finished stage needed and no later one does."""
    shutil.rmtree(work.path(stage), ignore_errors=True)
    if work.folder in start.parents:
        shutil.rmtree(start, ignore_errors=True)


def _without_history(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "history"}

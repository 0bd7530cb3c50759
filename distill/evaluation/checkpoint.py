"""What a converted model is worth beside its teacher: quality on text, retrieval, tasks of lm-eval."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xeco_convert.errors import OptionError
from xeco_convert.pretrained import load_causal_lm
from xeco_convert.tokenizer import load_tokenizer

from ..callbacks import Report
from ..data import PackedRows
from ..data.preparation import RowRequest, all_rows
from ..pair import ModelPair, open_pair, refuse_foreign_folder
from ..process import ProcessContext, open_process
from ..resume import RunFolder
from ..teacher import Teacher, check_head
from .needle import retrieval, trials
from .quality import measure_quality

_OTHER_SEED = 1_000_003  # sampled text must not be what a healing run with the same seed was trained on


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and on what; see the help of `xeco-distill eval`."""

    teacher: str | None = None
    teacher_revision: str | None = None
    data: str | None = None
    tokens: int = 32768
    seq_length: int | None = None
    needle: bool = False
    contexts: str | None = None
    needles: int = 4
    tasks: str | None = None
    include_tasks: Path | None = None
    limit: int | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, low in (
            ("--tokens", self.tokens, 1),
            ("--seq-length", self.seq_length, 2),
            ("--limit", self.limit, 1),
        ):
            if value is not None and value < low:
                raise OptionError(
                    f"{flag}: expected a whole number of at least {low}, found {value}; change the value."
                )
        for flag, setting in (("--include-tasks", self.include_tasks), ("--limit", self.limit)):
            if setting is not None and self.tasks is None:
                raise OptionError(f"{flag}: expected --tasks with it, found none; name the tasks, or leave {flag} out.")


def evaluate_checkpoint(
    folder: str | Path, options: EvalOptions | None = None, *, report: Report | None = None
) -> dict[str, Any]:
    """What the command measures, as JSON types. Raises the errors of healing."""
    tell: Report = report if report is not None else lambda what, share, figures: None
    options = options if options is not None else EvalOptions()
    folder = Path(folder).absolute()
    refuse_foreign_folder(folder)
    pair = open_pair(folder, options.teacher, options.teacher_revision, options.seq_length)
    lengths = parse_contexts(options.contexts, pair) if options.needle or options.contexts else ()
    tasks = None
    if options.tasks is not None:
        from .harness import find_tasks, run_tasks

        names = [task.strip() for task in options.tasks.split(",") if task.strip()]
        tasks = find_tasks(names, options.include_tasks, options.limit)
    process = open_process(options.device)
    tell("loading both models", 0.0, {})
    teacher = Teacher(_ready(pair.teacher.folder, process.device, "teacher"), pair.student.config["vocab_size"])
    student = _ready(folder, process.device, "student")
    rows = _rows(pair, options, process, teacher, tell)
    quality = measure_quality(teacher, student, rows, on_progress=lambda share: tell("measuring", share, {}))
    tell("measuring", 1.0, {})
    results: dict[str, Any] = {
        "quality": quality.to_dict(),
        "teacher": pair.teacher.name,
        "data": "text sampled from the teacher" if options.data is None else options.data,
        "kv_bytes_before": pair.kv_bytes_before,
        "kv_bytes_after": pair.kv_bytes_after,
    }
    if lengths:
        models = {"teacher": teacher.model, "student": student}
        results["needle"] = _needle(pair, rows, lengths, models, options, tell)
    if tasks is not None:
        tell("tasks of lm-eval", 0.0, {})
        results |= run_tasks(student, load_tokenizer(folder), tasks)
    return results


def parse_contexts(text: str | None, pair: ModelPair) -> tuple[int, ...]:
    """Context lengths, at most the model's longest. Raises `OptionError`."""
    longest = int(pair.student.config.get("max_position_embeddings") or 2**20)
    if text is None:
        return tuple(2**power for power in range(8, 18) if 2**power <= longest)
    try:
        lengths = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 1 or lengths[-1] > longest:
        raise OptionError(f"--contexts: expected lengths as 512,1024 up to the model's {longest}, found {text!r}.")
    return lengths


def _ready(folder: Path, device: torch.device, what: str) -> Any:
    """A model for measuring: as stored on a GPU, in float32 on a CPU."""
    dtype: torch.dtype | str = "auto" if device.type == "cuda" else torch.float32
    model = load_causal_lm(folder, dtype).to(device).eval()
    check_head(model, f"{what} {folder}")
    return model


def _rows(
    pair: ModelPair, options: EvalOptions, process: ProcessContext, teacher: Teacher, report: Report
) -> PackedRows:
    """The rows to measure on, made as for healing, in a folder that goes again."""
    request = RowRequest(
        pair=pair,
        training=1,
        held_out=max(1, math.ceil(options.tokens / pair.seq_length)),
        data=options.data,
        seed=options.seed + _OTHER_SEED,
    )
    with tempfile.TemporaryDirectory(prefix="xeco-distill-") as folder:
        rows = all_rows(request, RunFolder(Path(folder)), process, lambda: teacher, report)
        return rows.part(slice(request.held_out)).in_memory()


def _needle(
    pair: ModelPair,
    rows: PackedRows,
    lengths: tuple[int, ...],
    models: dict[str, Any],
    options: EvalOptions,
    report: Report,
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(pair.student.folder)
    text = [token for document in rows.documents(10**9) for token in document[1:]]
    text *= -(-2 * lengths[-1] // max(1, len(text)))  # a short text is told again
    results = []
    for number, length in enumerate(lengths):
        report("retrieval", number / len(lengths), {"context": float(length)})
        tasks = trials(tokenizer, text, length, options.needles, options.seed)
        results.append({"context": length} | {name: asdict(retrieval(model, tasks)) for name, model in models.items()})
    report("retrieval", 1.0, {})
    return results

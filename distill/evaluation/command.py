"""`xeco-distill eval OUT`: what a converted model is worth beside its teacher, into the terminal, the report and the card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import say_when_interrupted
from xeco_convert.errors import OptionError, OutputError
from xeco_convert.inspect_checkpoint import inspect_checkpoint
from xeco_convert.pretrained import load_causal_lm

from ..callbacks import Report
from ..card import evaluation_section
from ..data import PackedRows
from ..options import DistillOptions
from ..plan import HealingPlan, make_healing_plan, refuse_foreign_folder
from ..result import record_evaluation
from ..teacher import Teacher, check_head

_OTHER_SEED = 1_000_003  # sampled text must not be what a healing run with the same seed was trained on


@click.command(context_settings={"max_content_width": 110})
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--teacher", metavar="MODEL", help="Model to compare with. [the source recorded in OUT]")
@click.option("--teacher-revision", metavar="REV", help="Branch, tag or commit of --teacher on the hub.")
@click.option("--data", metavar="TEXT", help="Text to measure on, as for healing. [sampled from the teacher]")
@click.option("--tokens", default=32768, show_default=True, metavar="N", help="Tokens to measure on.")
@click.option("--seq-length", type=int, metavar="N", help="Tokens of a row. [1024, or the longest context]")
@click.option("--needle", is_flag=True, help="Also retrieval from growing contexts.")
@click.option("--contexts", metavar="LIST", help="needle: context lengths. [powers of two from 256 to the longest]")
@click.option("--needles", default=4, show_default=True, metavar="N", help="needle: trials at each of five depths.")
@click.option("--tasks", metavar="LIST", help="Also these lm-eval tasks, as arc_easy,hellaswag (extra [eval]).")
@click.option(
    "--include-tasks", type=click.Path(path_type=Path), metavar="DIR", help="Folder with further lm-eval tasks."
)
@click.option("--limit", type=int, metavar="N", help="Examples of each lm-eval task. [all]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[cuda where there is one]")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of samples and needles.")
@click.option("--card/--no-card", default=True, help="Put the results into OUT's report and model card. [yes]")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write them here."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def eval_command(folder: Path, card: bool, json_file: Path | None, quiet: bool, **settings: Any) -> None:
    """Measure a converted model: perplexity, KL from the teacher, top-1 agreement and KV size; on request retrieval and
    lm-eval tasks."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OutputError(f"--json: {json_file} cannot be written (no such folder); create it first.")
    say_when_interrupted(f"interrupted; {folder} is as it was, and nothing of this is recorded.")
    with progress(quiet, by_stage=True) as report:
        found = evaluate_checkpoint(folder, EvalOptions(**settings), report=report)
    text = evaluation_section(found)
    if not quiet:
        click.echo(text)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if card:
        record_evaluation(folder, found, text)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and on what; see the command's help."""

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


def evaluate_checkpoint(
    folder: str | Path, options: EvalOptions | None = None, *, report: Report | None = None
) -> dict[str, Any]:
    """What the command measures, as JSON types. Raises the errors of healing."""
    tell: Report = report if report is not None else lambda what, share, figures: None
    from ..pipeline import open_place
    from .quality import measure_quality

    asked = options if options is not None else EvalOptions()
    folder = Path(folder).absolute()
    refuse_foreign_folder(folder)
    run = DistillOptions(
        teacher=asked.teacher,
        teacher_revision=asked.teacher_revision,
        data=asked.data,
        seq_length=asked.seq_length,
        device=asked.device,
        seed=asked.seed + _OTHER_SEED,
        held_out_tokens=asked.tokens,
        stages="kl",
        budget_tokens=1,
        batch_size=1,
    )
    plan = make_healing_plan(folder, run)
    lengths = parse_contexts(asked.contexts, plan) if asked.needle or asked.contexts else ()
    device = open_place(run).device
    tell("loading both models", 0.0, {})
    teacher = Teacher(_ready(plan.teacher.folder, device, "teacher"), plan.student.config["vocab_size"])
    student = _ready(folder, device, "student")
    rows = _rows(plan, teacher, tell)
    sizes = inspect_checkpoint(folder)
    quality = measure_quality(teacher, student, rows, on_progress=lambda share: tell("measuring", share, {}))
    tell("measuring", 1.0, {})
    found: dict[str, Any] = {
        "quality": {**asdict(quality), "gap": quality.gap},
        "teacher": plan.teacher.name,
        "data": "text sampled from the teacher" if asked.data is None else asked.data,
        "kv_bytes_before": sizes["kv_bytes_before"],
        "kv_bytes_after": sizes["kv_bytes_after"],
    }
    if lengths:
        models = {"teacher": teacher.model, "student": student}
        found["needle"] = _needle(plan, rows, lengths, asked.needles, models, asked.seed, tell)
    if asked.tasks is not None:
        from .harness import run_tasks

        tell("tasks of lm-eval", 0.0, {})
        names = [task.strip() for task in asked.tasks.split(",") if task.strip()]
        found["tasks"], found["lm_eval"] = run_tasks(
            folder, names, include=asked.include_tasks, limit=asked.limit, batch_size=4, device=str(device)
        )
    return found


def _ready(folder: Path, device: torch.device, what: str) -> Any:
    """A model for measuring: as stored on a GPU, in float32 on a CPU."""
    dtype: torch.dtype | str = "auto" if device.type == "cuda" else torch.float32
    model = load_causal_lm(folder, dtype).to(device).eval()
    check_head(model, f"{what} {folder}")
    return model


def parse_contexts(text: str | None, plan: HealingPlan) -> tuple[int, ...]:
    """Context lengths, at most the model's longest. Raises `OptionError`."""
    longest = int(plan.student.config.get("max_position_embeddings") or 2**20)
    if text is None:
        return tuple(2**power for power in range(8, 18) if 2**power <= longest)
    try:
        lengths = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 1 or lengths[-1] > longest:
        raise OptionError(f"--contexts: expected lengths as 512,1024 up to the model's {longest}, found {text!r}.")
    return lengths


def _rows(plan: HealingPlan, teacher: Teacher, report: Report) -> PackedRows:
    """The rows to measure on, made as for healing, in a folder that goes again."""
    import tempfile

    from ..data.preparation import all_rows
    from ..stages.distillation import Place
    from ..work import RunFolder

    place = Place(device=next(teacher.model.parameters()).device, world=1, rank=0)
    with tempfile.TemporaryDirectory(prefix="xeco-distill-") as folder:
        rows = all_rows(plan, RunFolder(Path(folder)), place, lambda: teacher, report)
        return rows.part(slice(plan.held_out_rows())).in_memory()


def _needle(
    plan: HealingPlan,
    rows: PackedRows,
    lengths: tuple[int, ...],
    count: int,
    models: dict[str, Any],
    seed: int,
    report: Report,
) -> list[dict[str, Any]]:
    from xeco_convert.tokenizer import load_tokenizer

    from ..evaluation.needle import retrieval, trials

    tokenizer = load_tokenizer(plan.student.folder)
    text = [token for document in rows.documents(10**9) for token in document[1:]]
    text *= -(-2 * lengths[-1] // max(1, len(text)))  # a short text is told again
    found = []
    for number, length in enumerate(lengths):
        report("retrieval", number / len(lengths), {"context": float(length)})
        given = trials(tokenizer, text, length, count, seed)
        found.append({"context": length} | {name: asdict(retrieval(model, given)) for name, model in models.items()})
    report("retrieval", 1.0, {})
    return found

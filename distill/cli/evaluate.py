"""`xeco-distill eval OUT`: into the terminal, the report and the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xeco_convert.commandline.output import json_option, quiet_option, write_json
from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import say_when_interrupted


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
    "--include-tasks",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with further tasks: lm-eval's YAML, or rows in NAME.jsonl, scored without a network. [lm-eval's own]",
)
@click.option("--limit", type=int, metavar="N", help="Examples of each task; of a file evenly spread. [all]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[cuda where there is one]")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of samples and needles.")
@click.option("--card/--no-card", default=True, help="Put the results into OUT's report and model card. [yes]")
@json_option("Also write them here.")
@quiet_option
def eval_command(folder: Path, card: bool, json_file: Path | None, quiet: bool, **settings: Any) -> None:
    """Measure a converted model: perplexity, KL from the teacher, top-1 agreement and KV size; on request retrieval and
    lm-eval tasks."""
    from ..card import evaluation_section
    from ..evaluation.checkpoint import EvalOptions, evaluate_checkpoint
    from ..publish import record_evaluation

    say_when_interrupted(f"interrupted; {folder} is as it was, and nothing of this is recorded.")
    with progress(quiet, by_stage=True) as report:
        results = evaluate_checkpoint(folder, EvalOptions(**settings), report=report)
    text = evaluation_section(results)
    if not quiet:
        click.echo(text)
    write_json(json_file, results)
    if card:
        record_evaluation(folder, results, text)

"""`xeco-convert export OUT DEST`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xeco_convert.cli.options import OptionsCommand
from xeco_convert.commandline.output import json_option, own_warnings_last, quiet_option, write_json
from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import say_when_interrupted, when_interrupted
from xeco_convert.export.engines import ENGINES
from xeco_convert.export.options import ExportOptions
from xeco_convert.report import format_cell
from xeco_convert.settings import option_fields

if TYPE_CHECKING:
    from xeco_convert.export import ExportReport


class ExportCommand(OptionsCommand):
    """With the options of an export."""

    def options(self) -> Iterable[dataclasses.Field[Any]]:
        return option_fields(ExportOptions).values()


@click.command(cls=ExportCommand, context_settings={"max_content_width": 110})
@click.argument("converted", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("output", metavar="DEST", type=click.Path(path_type=Path))
@json_option("Also write the report here.")
@quiet_option
def export_command(converted: Path, output: Path, json_file: Path | None, quiet: bool, **fields: Any) -> None:
    """Write a converted checkpoint as a stock model that engines load without this package.

    OUT is a folder that xeco-convert wrote (best with --portable); DEST the folder to write. transformers' own class loads the
    result, and its logits and greedy text are compared with those of OUT; a mismatch is an error.
    """
    from transformers.utils import logging

    from xeco_convert.export.pipeline import export_checkpoint

    options = ExportOptions(**fields)
    say_when_interrupted(when_interrupted(output, "."))
    logging.disable_progress_bar()  # transformers' own bars would run into this command's
    with own_warnings_last(quiet), progress(quiet) as on_progress:
        report = export_checkpoint(converted, output, options, on_progress=on_progress)
    write_json(json_file, report.to_dict())
    if not quiet:
        _show_export(report, output)


def _show_export(report: ExportReport, output: Path) -> None:
    comparison = report.comparison
    click.echo(
        f"{output}: {report.format} for {report.target}: kv_lora_rank {report.kv_lora_rank}, qk_nope_head_dim "
        f"{report.qk_nope_head_dim}, qk_rope_head_dim {report.qk_rope_head_dim}, v_head_dim {report.v_head_dim}"
    )
    before, after = report.kv_numbers_before, report.kv_numbers_after
    click.echo(f"KV cache: {before} -> {after} numbers per token, all layers")
    advice = ENGINES.find(report.target, "--target").padding_advice
    if advice and after > before:
        click.echo(f"padding: {after / before:.1f} times the cache of the converted folder; {advice}")
    if report.rank_kl is not None:
        click.echo(
            f"smaller rank: KL {format_cell(report.rank_kl)} nats per token to the converted model, top-1 {report.rank_top1:.1%}"
        )
    if report.norm_kl is not None:
        click.echo(
            f"latent norm: put in place, KL {format_cell(report.norm_kl)} nats per token, top-1 {report.norm_top1:.1%}; "
            "convert with --portable to have it from the start"
        )
    click.echo(
        f"against transformers' own class: logits differ by {comparison.logits_difference:.1e} of their standard deviation, "
        f"greedy text equal for {comparison.greedy_agreement} of {comparison.greedy_tokens} tokens"
    )

"""`xeco-convert sweep IN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from xeco_convert.cli.options import OptionsCommand
from xeco_convert.commandline.output import (
    file_option,
    json_option,
    own_warnings_last,
    print_table,
    quiet_option,
    write_json,
    write_text,
)
from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import say_when_interrupted
from xeco_convert.options import ConvertOptions

# A sweep makes no output and chooses the widths itself.
_OPTIONS = (
    "calibration",
    "calibration_tokens",
    "refine",
    "refine_steps",
    "refine_minutes",
    "work_dir",
    "rank_multiple",
    "q_rank",
    "latent_norm",
    "qk_norm",
    "seed",
    "layers",
    "device",
    "revision",
)


class SweepCommand(OptionsCommand):
    """With those options of a conversion that a sweep has."""

    def options(self) -> Iterable[dataclasses.Field[Any]]:
        fields = ConvertOptions.fields()
        return [fields[name] for name in _OPTIONS]


@click.command(cls=SweepCommand, context_settings={"max_content_width": 110})
@click.argument("source", metavar="IN")
@click.option(
    "--kv-sizes",
    default="75,50,25,12.5",
    show_default=True,
    metavar="LIST",
    help="Sizes of the KV cache to try, in percent of the source's.",
)
@click.option(
    "--cache-bits",
    default="16",
    show_default=True,
    metavar="LIST",
    help="Bits of a cached number to try at each size, some of 16, 8, 4, 3, 2 and auto, as 16,8,4,3.",
)
@json_option("Also write the results here.")
@file_option("--html", "html_file", "Also write a page with the trade-off curve here.")
@quiet_option
def sweep_command(
    source: str,
    kv_sizes: str,
    cache_bits: str,
    json_file: Path | None,
    html_file: Path | None,
    quiet: bool,
    **fields: Any,
) -> None:
    """Measure what each size of the KV cache would cost in quality before any training. Writes no checkpoint.

    IN is a checkpoint folder or a Hugging Face hub id. Runs the calibrated initialisation once for each size and number of bits.
    """
    from xeco_convert.sweep import COLUMNS, parse_bits, parse_sizes, sweep, sweep_page

    sizes, bits = parse_sizes(kv_sizes), parse_bits(cache_bits)
    options = ConvertOptions(kv_size="100%", **fields)
    say_when_interrupted(f"interrupted; nothing was written{options.initialisation.when_interrupted()}")
    with own_warnings_last(quiet), progress(quiet) as on_progress:
        report = sweep(source, sizes, options, cache_bits=bits, on_progress=on_progress)
    write_json(json_file, report.to_dict())
    if html_file is not None:
        write_text("--html", html_file, sweep_page(report))
    if quiet:
        return
    print_table(COLUMNS, report.rows())
    for problem in report.problems():
        click.echo(problem)
    if len(bits) > 1:
        best = ", ".join(point.name for point in report.envelope())
        click.echo(f"Beaten by no other of as few bytes: {best}.")
    click.echo(report.setting())

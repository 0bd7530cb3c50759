"""`xeco-convert IN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xeco_convert import __version__
from xeco_convert.cli.options import OptionsCommand
from xeco_convert.cli.plan_view import plan_summary, show_plan
from xeco_convert.cli.report_view import show_report
from xeco_convert.commandline.output import json_option, own_warnings_last, quiet_option, write_json
from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import say_when_interrupted, when_interrupted
from xeco_convert.errors import OptionError
from xeco_convert.options import ConvertOptions

_EPILOG = """\b
Also:
  xeco-convert inspect FOLDER    what a converted checkpoint is
  xeco-convert sweep IN          what each KV size would cost in quality; writes no checkpoint
  xeco-convert export OUT DEST   a converted checkpoint as stock DeepSeek-V3, for other engines
  xeco-convert refresh OUT       what an older version wrote beside the weights, as this one writes it
                                 (folders of these names are written ./inspect, ./sweep, ./export and ./refresh)

Result on stdout, progress and messages on stderr. Exit code 2: change the command line; 1: anything else."""


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    import platform

    import torch
    import transformers

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    capability = torch.backends.cpu.get_cpu_capability()
    click.echo(f"xeco-convert {__version__}")
    click.echo(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    click.echo(f"cpu: {capability}, {torch.get_num_threads()} threads; gpu: {', '.join(gpus) or 'none'}")
    context.exit()


@click.command(cls=OptionsCommand, epilog=_EPILOG, context_settings={"max_content_width": 110})
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT", required=False, type=click.Path(path_type=Path))
@json_option("Also write the report here.")
@click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone, and stop; OUT may be left out.")
@quiet_option
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show versions and devices.",
)
def convert_command(
    source: str, output: Path | None, json_file: Path | None, dry_run: bool, quiet: bool, **fields: Any
) -> None:
    """Convert the attention of a pretrained model to multi-head latent attention (MLA).

    IN is a checkpoint folder or a Hugging Face hub id; OUT is the folder to write.
    """
    options = ConvertOptions(**fields)
    if output is None and not dry_run:
        raise OptionError("OUT is missing: give the folder to write, as in `xeco-convert IN OUT --rank 128`.")
    from xeco_convert.conversion import convert_as_planned, plan_conversion

    with own_warnings_last(quiet):
        plan = plan_conversion(source, output, options)
        if not quiet:
            show_plan(plan, on_stdout=dry_run)
        if dry_run:
            write_json(json_file, plan_summary(plan))
            return
        assert output is not None
        say_when_interrupted(when_interrupted(output, options.initialisation.when_interrupted()))
        with progress(quiet) as on_progress:
            report = convert_as_planned(plan, output, on_progress=on_progress)
    write_json(json_file, report.to_dict())
    if not quiet:
        show_report(report)

"""The command `xeco-convert`: argv -> options -> call. The only place with exit codes, prints and progress bars.

Imports torch and transformers only where a command needs them, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xeco_convert import __version__
from xeco_convert.command import Replaced, run_command, say_when_interrupted
from xeco_convert.errors import OptionError, OutputError, XecoWarning
from xeco_convert.options import ConvertOptions
from xeco_convert.progress import progress
from xeco_convert.ranks import Widths
from xeco_convert.report import format_cell
from xeco_convert.settings import choices_of, default_of, flag_of, help_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xeco_convert.export import ExportReport
    from xeco_convert.plan import ConversionPlan
    from xeco_convert.report import ConversionReport

_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}
# A sweep makes no output and chooses the widths itself.
_SWEEP_OPTIONS = (
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
_EPILOG = """\b
Also:
  xeco-convert inspect FOLDER    what a converted checkpoint is
  xeco-convert sweep IN          what each KV size would cost in quality; writes no checkpoint
  xeco-convert export OUT DEST   a converted checkpoint as stock DeepSeek-V3, for other engines
  xeco-convert refresh OUT       what an older version wrote beside the weights, as this one writes it
                                 (folders of these names are written ./inspect, ./sweep, ./export and ./refresh)

Result on stdout, progress and messages on stderr. Exit code 2: change the command line; 1: anything else."""


class OptionsCommand(click.Command):
    """A command with a flag for each option of a conversion, behind its arguments: those that are registered when it is run.
    `option_names`: only these, or all."""

    option_names: Sequence[str] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        fields = ConvertOptions.fields()
        flags = [_flag(fields[name]) for name in self.option_names or fields]
        own = super().get_params(ctx)
        arguments = [parameter for parameter in own if isinstance(parameter, click.Argument)]
        return [*arguments, *flags, *(parameter for parameter in own if parameter not in arguments)]


class SweepCommand(OptionsCommand):
    """A sweep makes no output and chooses the widths itself."""

    option_names = _SWEEP_OPTIONS


def _flag(field: dataclasses.Field[Any]) -> click.Option:
    flag, choices, default = flag_of(field.name), choices_of(field), default_of(field)
    if field.type == "bool":
        return click.Option([flag], is_flag=True, help=help_of(field))
    return click.Option(
        [flag],
        type=click.Choice(choices) if choices else _TYPES[str(field.type).removesuffix(" | None")],
        default=default,
        show_default=default is not None,
        metavar=field.metadata["metavar"],
        help=help_of(field),
    )


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
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the report here.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone, and stop; OUT may be left out.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
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
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OutputError(f"--json: {json_file} cannot be written (no such folder); create it first.")
    from xeco_convert.conversion import convert_as_planned, plan_conversion

    with _warnings(quiet):
        plan = plan_conversion(source, output, options)
        if not quiet:
            _show_plan(plan, on_stdout=dry_run)
        if dry_run:
            _write_json(json_file, plan_summary(plan))
            return
        assert output is not None
        say_when_interrupted(_interrupted_conversion(output, options))
        with progress(quiet) as on_progress:
            report = convert_as_planned(plan, output, on_progress=on_progress)
    _write_json(json_file, report.to_dict())
    if not quiet:
        _show_report(report)


def _interrupted_conversion(output: Path, options: ConvertOptions) -> Callable[[], str]:
    return _interrupted_output(output, options.initialisation.when_interrupted())


def _interrupted_output(output: Path, kept: str) -> Callable[[], str]:
    """What to say after Ctrl-C; it may come when all is done but the report."""
    written = Replaced(output)
    return lambda: (
        f"interrupted; {output} was written whole, only the report was not."
        if written
        else f"interrupted; nothing was written{kept}"
    )


@click.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect_command(folder: Path, as_json: bool) -> None:
    """Show what a converted checkpoint is: source, initialisation, widths and cache of every layer."""
    from xeco_convert.inspection import inspect_checkpoint

    found = inspect_checkpoint(folder)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    source = found["source"]
    revision = f" at {source['revision']}" if source.get("revision") else ""
    click.echo(
        f"{folder}: {found['model_type']}, {found['init']} from {source['path']}{revision}, made by {found['tool']}"
    )
    columns = (
        "layer",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "q_lora_rank",
        "KV numbers",
        "key error",
        "value error",
    )
    _print_table(columns, [_inspect_row(row) for row in found["layers"]])
    before, after = found["kv_bytes_before"], found["kv_bytes_after"]
    click.echo(f"KV cache: {after} bytes per token, the source's {before}: {after / before:.1%}")


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
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the results here.",
)
@click.option(
    "--html",
    "html_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write a page with the trade-off curve here.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def sweep_command(
    source: str, kv_sizes: str, json_file: Path | None, html_file: Path | None, quiet: bool, **fields: Any
) -> None:
    """Measure what each size of the KV cache would cost in quality before any training. Writes no checkpoint.

    IN is a checkpoint folder or a Hugging Face hub id. Runs the calibrated initialisation once for each size.
    """
    for flag, file in (("--json", json_file), ("--html", html_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise OutputError(f"{flag}: {file} cannot be written (no such folder); create it first.")
    from xeco_convert.sweep import COLUMNS, parse_sizes, sweep, sweep_page

    sizes = parse_sizes(kv_sizes)
    options = ConvertOptions(kv_size="100%", **fields)
    say_when_interrupted(f"interrupted; nothing was written{options.initialisation.when_interrupted()}")
    with _warnings(quiet), progress(quiet) as on_progress:
        report = sweep(source, sizes, on_progress=on_progress, **fields)
    _write_json(json_file, report.to_dict())
    if html_file is not None:
        _write_text("--html", html_file, sweep_page(report))
    if quiet:
        return
    _print_table(COLUMNS, report.rows())
    for problem in report.problems():
        click.echo(problem)
    click.echo(report.setting())


@click.command(context_settings={"max_content_width": 110})
@click.argument("converted", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("output", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_name", default="deepseek-v3", show_default=True, metavar="FORMAT", help="deepseek-v3, dense."
)
@click.option(
    "--target",
    default="transformers",
    show_default=True,
    metavar="ENGINE",
    help="Choose widths that this engine takes: transformers, vllm, sglang or llama.cpp.",
)
@click.option(
    "--seed", default=0, show_default=True, metavar="N", help="Seed of sampling, where a norm has to be put in."
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest weight file.")
@click.option("--overwrite", is_flag=True, help="Replace DEST if it exists.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the report here.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def export_command(
    converted: Path, output: Path, format_name: str, json_file: Path | None, quiet: bool, **fields: Any
) -> None:
    """Write a converted checkpoint as a stock model that engines load without this package.

    OUT is a folder that xeco-convert wrote (best with --portable); DEST the folder to write. transformers' own class loads the
    result, and its logits and greedy text are compared with those of OUT; a mismatch is an error.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OutputError(f"--json: {json_file} cannot be written (no such folder); create it first.")
    from transformers.utils import logging

    from xeco_convert.export import ExportOptions, export_checkpoint

    options = ExportOptions(format=format_name, **fields)
    say_when_interrupted(_interrupted_output(output, "."))
    logging.disable_progress_bar()  # transformers' own bars would run into this command's
    with _warnings(quiet), progress(quiet) as on_progress:
        report = export_checkpoint(converted, output, options, on_progress=on_progress)
    _write_json(json_file, report.to_dict())
    if not quiet:
        _show_export(report, output)


def _show_export(report: ExportReport, output: Path) -> None:
    found = report.comparison
    click.echo(
        f"{output}: {report.format} for {report.target}: kv_lora_rank {report.kv_lora_rank}, qk_nope_head_dim "
        f"{report.qk_nope_head_dim}, qk_rope_head_dim {report.qk_rope_head_dim}, v_head_dim {report.v_head_dim}"
    )
    click.echo(f"KV cache: {report.kv_numbers_before} -> {report.kv_numbers_after} numbers per token, all layers")
    if report.norm_kl is not None:
        click.echo(
            f"latent norm: put in place, KL {format_cell(report.norm_kl)} nats per token, top-1 {report.norm_top1:.1%}; "
            "convert with --portable to have it from the start"
        )
    click.echo(
        f"against transformers' own class: logits differ by {found.logits_difference:.1e} of their standard deviation, greedy "
        f"text equal for {found.greedy_agreement} of {found.greedy_tokens} tokens"
    )


@click.command(context_settings={"max_content_width": 110})
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", metavar="IN", help="The model that OUT was converted from, where it lies elsewhere now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of sentences.")
def refresh_command(folder: Path, source: str | None, as_json: bool) -> None:
    """Renew code files, config.json and tokenizer of a folder that an older version converted; weights stay.

    OUT is a folder that xeco-convert wrote or xeco-distill healed (no export: export again from the refreshed folder). Its
    tokenizer is compared with that of the source, which config.json records.
    """
    from xeco_convert.refresh import refresh_checkpoint

    report = refresh_checkpoint(folder, source)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    for what, names in (("changed", report.changed), ("added", report.added), ("removed", report.removed)):
        if names:
            click.echo(f"{what}: {', '.join(names)}")
    if not (report.changed or report.added or report.removed):
        click.echo(f"{folder}: nothing to renew, it is as this version writes it")
    if report.tokenizer_left is not None:
        click.echo(f"tokenizer not compared: {report.tokenizer_left}")


_SUBCOMMANDS = {
    "inspect": inspect_command,
    "sweep": sweep_command,
    "export": export_command,
    "refresh": refresh_command,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the subcommand that the first argument names, else the conversion."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command: click.Command = convert_command
    name = "xeco-convert"
    if given and given[0] in _SUBCOMMANDS:
        command, name = _SUBCOMMANDS[given[0]], f"xeco-convert {given[0]}"
        given = given[1:]
    run_command(command, given, name)


def plan_summary(plan: ConversionPlan) -> dict[str, Any]:
    """The plan as JSON types, as --dry-run --json writes it."""
    headers = plan.output_headers()
    return {
        "model_type": plan.source.model_type,
        "dtype": plan.dtype,
        "ranks_are_final": plan.widths_are_final,
        "layers": [
            {
                "layer": item.layer,
                "converted": item in plan.converted,
                "kv_numbers_before": before,
                "kv_numbers_after": after,
            }
            for item, before, after in zip(
                plan.layers, plan.source_kv_numbers_per_token(), plan.kv_numbers_per_token(), strict=True
            )
        ],
        "exact_keys": dict(zip(("parameters", "multiplications_per_token"), plan.exact_key_cost(), strict=True)),
        "weights_bytes": sum(header.num_bytes for header in headers),
        "num_tensors": len(headers),
        "dropped": list(plan.dropped),
    }


def _show_plan(plan: ConversionPlan, *, on_stdout: bool) -> None:
    source, geometry, options, shape = plan.source, plan.source.geometry, plan.options, plan.converted[0].shape
    lines = [
        f"{source.index.folder}: {source.model_type}, {geometry.num_hidden_layers} layers, "
        f"hidden_size {geometry.hidden_size}, {geometry.num_attention_heads} heads in "
        f"{geometry.num_key_value_heads} key/value groups of head_dim {geometry.head_dim}"
    ]
    query = "" if shape.q_lora_rank is None else f", q_lora_rank {shape.q_lora_rank}"
    lines.append(
        f"{options.init}: {len(plan.converted)} of {len(plan.layers)} layers get {_widths_in_words(plan)}, "
        f"qk_nope_head_dim {shape.qk_nope_head_dim}{query}"
    )
    facts, budget = plan.cache_facts, plan.kv_budget
    before = facts.numbers_before
    after = sum(plan.kv_numbers_per_token()) if budget is None else min(before, budget + facts.numbers_kept)
    windows = plan.kept_windows
    if windows:
        lines.append(
            f"{len(windows)} layers keep their sliding window of {windows[0].window} tokens: their cache does not "
            f"grow with the text, and is not counted (--layers 0-{len(plan.layers) - 1} converts them too)"
        )
    bound = "" if plan.widths_are_final else "at most "
    parameters, products = plan.exact_key_cost()
    if parameters:
        lines.append(
            f"normalised keys stay exact, computed by the source's own projections and norm before they become latents: {bound}"
            f"{parameters:,} parameters and {products:,} multiplications for each token written more than linear keys "
            "(--qk-norm regression)"
        )
    lines.append(f"KV cache: {before} -> {bound}{after} numbers per token ({after / before:.1%})")
    if after >= before:
        lines.append("note: this is no smaller than the source's cache; choose a smaller size")
    headers = plan.output_headers()
    lines.append(
        f"weights: {len(headers)} tensors, {bound}{sum(h.num_bytes for h in headers) / 1e9:.3f} GB, {plan.dtype}"
    )
    if plan.dropped:
        lines.append(f"left out: {', '.join(plan.dropped)}")
    for line in lines:
        click.echo(line, err=not on_stdout)


def _widths_in_words(plan: ConversionPlan) -> str:
    """The widths of the converted layers, or how they will be chosen."""
    shape = plan.converted[0].shape
    widths = Widths(kv_lora_rank=shape.kv_lora_rank, qk_rope_head_dim=shape.qk_rope_head_dim)
    default = " (default)" if plan.options.rope_dim is None else ""
    return plan.options.policy.describe(plan.cache_facts, widths, default)


@contextmanager
def _warnings(quiet: bool) -> Iterator[None]:
    """Our own warnings as sentences on stderr, behind the progress bar; those of libraries as always."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", XecoWarning)
            yield
    finally:
        for item in caught:
            if not issubclass(item.category, XecoWarning):
                warnings.showwarning(item.message, item.category, item.filename, item.lineno)
        own = dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, XecoWarning))
        for sentence in own if not quiet else ():  # each once: the plan is made for showing and for doing
            click.echo(f"warning: {sentence}", err=True)


def _show_report(report: ConversionReport) -> None:
    columns = ["layer", "kv_lora_rank", "rope dim", "key error", "value error", "KV bytes before", "KV bytes after"]
    verified = any(layer.exactness_error is not None for layer in report.layers)
    rows = []
    for layer in report.layers:
        row = [
            layer.layer,
            layer.kv_lora_rank or "kept",
            layer.qk_rope_head_dim or "",
            layer.key_error,
            layer.value_error,
        ]
        row += [numbers * report.kv_bytes_per_number for numbers in (layer.kv_numbers_before, layer.kv_numbers_after)]
        rows.append(row + ([layer.exactness_error, layer.output_error] if verified else []))
    _print_table(columns + (["exactness error", "output error"] if verified else []), rows)
    click.echo(f"KV cache: {report.kv_bytes_before} -> {report.kv_bytes_after} bytes per token ({report.kv_share:.1%})")
    if report.path_error is not None:
        click.echo(
            f"path to the logits, attention set aside: differs by {format_cell(report.path_error)} of their deviation"
        )
    change = report.parameters_after / report.parameters_before - 1
    click.echo(f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} ({change:+.1%})")
    click.echo(
        f"{report.output}: written in {report.seconds:.1f} s, peak memory {report.peak_memory_bytes / 2**20:.0f} MiB"
    )


def _inspect_row(row: dict[str, Any]) -> list[Any]:
    widths = [row.get(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "q_lora_rank")]
    first = row.get("kv_lora_rank") or "kept"
    return [row["layer"], first, *widths, row["kv_numbers_after"], row.get("key_error"), row.get("value_error")]


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table on stdout, the same on a terminal and in a file."""
    cells = [list(columns)] + [[format_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        click.echo("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)))


def _write_json(file: Path | None, data: dict[str, Any]) -> None:
    if file is not None:
        _write_text("--json", file, json.dumps(data, indent=2) + "\n")


def _write_text(flag: str, file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{flag}: {file} cannot be written ({error.strerror}).") from None

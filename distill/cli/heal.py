"""`xeco-distill OUT`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xeco_convert.commandline.output import json_option, quiet_option, write_json
from xeco_convert.commandline.progress import progress
from xeco_convert.commandline.run import Replaced, say_when_interrupted
from xeco_convert.errors import OptionError
from xeco_convert.settings import choices_of, default_of, flag_of, help_of

from ..options import DistillOptions, checked_mapping

if TYPE_CHECKING:
    from ..pipeline import HealingReport

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}
_EXTRAS = {"accelerate": "distill", "yaml": "distill"}
_EPILOG = """\b
Also:
  xeco-distill eval OUT     perplexity, KL, retrieval at growing context, lm-eval tasks
  xeco-distill recipes      the recipes that --config takes by name
  torchrun --nproc-per-node N -m xeco_distill OUT ...     several devices (docs/healing.md)

Result on stdout, progress and messages on stderr. Exit code 2: change the command line; 1: anything else. An interrupted
run is continued by the same command."""


class HealCommand(click.Command):
    """With a flag for each option of a healing run, behind its arguments: those that are registered when it is run."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        config = next(number for number, parameter in enumerate(own) if parameter.name == "config") + 1
        return [*own[:config], *map(_flag, DistillOptions.fields().values()), *own[config:]]


def _flag(item: dataclasses.Field[Any]) -> click.Option:
    """Defaults stay with the fields: None means not given."""
    flag, default = flag_of(item.name), default_of(item)
    if item.type == "bool":
        return click.Option(
            [f"{flag}/--no-{item.name.replace('_', '-')}" if default else flag],
            default=None,
            is_flag=True,
            help=help_of(item),
        )
    choices = choices_of(item)
    return click.Option(
        [flag],
        type=click.Choice(choices) if choices else _TYPES[str(item.type).removesuffix(" | None")],
        metavar=item.metadata["metavar"],
        help=help_of(item) + ("" if default is None else f" [{default}]"),
    )


@click.command(cls=HealCommand, epilog=_EPILOG, context_settings={"max_content_width": 110})
@click.argument("folder", metavar="OUT", required=False, type=click.Path(path_type=Path))
@click.option(
    "--config", metavar="FILE", help="YAML file with options, or a recipe's name; options given beside it win."
)
@click.option(
    "--trainer",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of transformers' TrainingArguments, as gradient_checkpointing=true; may be repeated.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan, memory and time, and stop; with a recipe OUT may be left out."
)
@json_option("Also write the report here.")
@quiet_option
def distill_command(
    folder: Path | None,
    config: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    json_file: Path | None,
    quiet: bool,
    **fields: Any,
) -> None:
    """Heal the converted checkpoint OUT by distillation from its source. With nothing else given, everything else is
    chosen: the teacher is the source recorded in OUT, the text is sampled from it."""
    from ..recipes import load_config

    recipe = load_config(config) if config is not None else None
    options = merge_options({} if recipe is None else recipe.options, fields, settings)
    if folder is None:
        if not dry_run or recipe is None or recipe.shape is None:
            raise OptionError("OUT is missing: give the folder that xeco-convert wrote, as in `xeco-distill out/`.")
        for line in recipe.dry_run(options):
            click.echo(line)
        return
    require_extras()
    _show_plan(folder, options, dry_run=dry_run, quiet=quiet)
    if dry_run:
        return
    from transformers.utils import logging

    from ..pipeline import heal, work_place

    say_when_interrupted(_interrupted(folder, work_place(folder.absolute(), options), options))
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # other bars would run into this command's
    logging.disable_progress_bar()
    with progress(quiet or not is_main_process(), by_stage=True) as report:
        healed = heal(folder, options, report=report)
    if not is_main_process():
        return
    write_json(json_file, healed.to_dict())
    if not quiet:
        _show_report(healed)


def _interrupted(folder: Path, work: Path, options: DistillOptions) -> Callable[[], str]:
    """What to say after Ctrl-C; it may come when all is done but the report."""
    output = folder if options.output is None else Path(options.output)
    healed = Replaced(output)
    return lambda: (
        f"interrupted; {output} holds the healed model, only the report was not written."
        if healed
        else f"interrupted; {folder} is as it was, what was done is kept in {work}, and the same command continues the run."
    )


def merge_options(
    base: Mapping[str, Any], fields: Mapping[str, Any], settings: Sequence[str] = (), where: str = "the command line"
) -> DistillOptions:
    """Options from a recipe, then the command line, which wins."""
    values = {name: value for name, value in fields.items() if value is not None}
    trainer = {**dict(base.get("trainer") or {}), **dict(map(_setting, settings))}
    return DistillOptions(**{**base, **checked_mapping(values, where), "trainer": trainer})


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise OptionError(f"--trainer: expected NAME=VALUE, found {text!r}; for example --trainer weight_decay=0.1.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str):  # YAML 1.1 reads 8e-5 as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    return name.strip().replace("-", "_"), parsed


def require_extras() -> None:
    """One sentence for libraries that are not installed."""
    import importlib.util

    for module, extra in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            raise OptionError(f"xeco-distill needs {module}: pip install 'xeco-convert[{extra}]'.")


def is_main_process() -> bool:
    """Whether this process prints, where several take part."""
    return os.environ.get("RANK", "0") == "0"


def _show_plan(folder: Path, options: DistillOptions, *, dry_run: bool, quiet: bool) -> None:
    if quiet or not is_main_process():
        return
    import torch

    from ..pair import refuse_foreign_folder
    from ..pipeline import work_place
    from ..plan import Sizes, describe, describe_estimate, estimate, make_healing_plan, measured_flops
    from ..publish import recover

    recover(folder.absolute(), work_place(folder.absolute(), options) / "result")
    refuse_foreign_folder(folder)
    plan = make_healing_plan(folder, options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cuda = torch.cuda.is_available() if options.device is None else options.device == "cuda"
    device = torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")
    flops = measured_flops(device) if dry_run else 1.0
    sizes = estimate(Sizes.of(plan), options, plan.seq_length, world=world, flops=flops)
    lines = describe(plan, sizes, world)
    if dry_run:
        lines += describe_estimate(sizes, device, world)
    for line in lines:
        click.echo(line, err=not dry_run)


def _show_report(report: HealingReport) -> None:
    before, after = report.before, report.after
    for stage, facts in report.stages.items():
        if "skipped" in facts:
            click.echo(f"{stage}: skipped ({facts['skipped']})")
    click.echo(f"{'':>22}  {'before':>9}  {'after':>9}")
    rows = (
        ("perplexity", "perplexity", "{:.4g}"),
        ("gap to the teacher", "gap", "{:.4f}"),
        ("KL from the teacher", "kl", "{:.4f}"),
        ("same top-1 token", "top1", "{:.1%}"),
    )
    for name, key, form in rows:
        click.echo(f"{name:>22}  {form.format(before[key]):>9}  {form.format(after[key]):>9}")
    click.echo(f"teacher's perplexity {after['perplexity_source']:.4g}; {after['num_tokens']:,} predictions held out")
    click.echo(f"{report.output}: healed in {report.seconds:.1f} s")

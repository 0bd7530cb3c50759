"""`xeco-convert refresh OUT`."""

from __future__ import annotations

import json
from pathlib import Path

import click


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

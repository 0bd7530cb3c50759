"""`xeco-convert inspect FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from xeco_convert.commandline.output import print_table


@click.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect_command(folder: Path, as_json: bool) -> None:
    """Show what a converted checkpoint is: source, initialisation, widths and cache of every layer."""
    from xeco_convert.inspect_checkpoint import inspect_checkpoint

    facts = inspect_checkpoint(folder)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    source = facts["source"]
    revision = f" at {source['revision']}" if source.get("revision") else ""
    click.echo(
        f"{folder}: {facts['model_type']}, {facts['init']} from {source['path']}{revision}, made by {facts['tool']}"
    )
    columns = (
        "layer",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "q_lora_rank",
        "KV numbers",
        "bits",
        "key error",
        "value error",
    )
    print_table(columns, [_row(row) for row in facts["layers"]])
    before, after = facts["kv_bytes_before"], facts["kv_bytes_after"]
    click.echo(f"KV cache: {after} bytes per token, the source's {before}: {after / before:.1%}")


def _row(row: dict[str, Any]) -> list[Any]:
    widths = [row.get(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "q_lora_rank")]
    first = row.get("kv_lora_rank") or "kept"
    cached = [row["kv_numbers_after"], row.get("bits")]
    return [row["layer"], first, *widths, *cached, row.get("key_error"), row.get("value_error")]

"""The command `xeco-distill`. It only says what it will do, until the training stages are there."""

from __future__ import annotations

from pathlib import Path

import click

from xeco_convert.command import run_command


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
def distill_command(folder: Path) -> None:
    """Show how the converted checkpoint OUT would be healed. Training itself is not part of this version."""
    from xeco_convert.inspection import inspect_checkpoint

    found = inspect_checkpoint(folder)
    converted = [layer for layer in found["layers"] if "kv_lora_rank" in layer]
    share = found["kv_bytes_after"] / found["kv_bytes_before"]
    click.echo(
        f"student: {folder} ({found['model_type']}, {len(converted)} MLA layers, KV cache {share:.1%} of the source's)"
    )
    click.echo(f"teacher: {found['source']['path']}")
    click.echo("stages to come: layer-wise regression, KL from teacher to student, DPO")
    click.echo("This version does not train yet; nothing was changed.", err=True)


def main() -> None:
    """Entry point."""
    import sys

    run_command(distill_command, sys.argv[1:], "xeco-distill")

"""`xeco-distill recipes`."""

from __future__ import annotations

import click

from ..recipes import load_config, recipe_names


@click.command()
def recipes_command() -> None:
    """List the recipes that --config takes by name."""
    for name in recipe_names():
        click.echo(f"{name:32}  {load_config(name).about}")

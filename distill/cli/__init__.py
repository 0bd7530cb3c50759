"""The command `xeco-distill`: argv -> options -> call, one module for each command. The only place with prints."""

from __future__ import annotations

from collections.abc import Sequence

import click

from xeco_convert.commandline.run import run_named

from .evaluate import eval_command
from .heal import distill_command
from .recipes import recipes_command

COMMANDS = click.Group(commands={"eval": eval_command, "recipes": recipes_command})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the command that the first argument names, else healing."""
    run_named(COMMANDS.commands, distill_command, arguments, "xeco-distill")

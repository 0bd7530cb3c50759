"""The command `xeco-distill`: argv -> options -> call, one module for each command. The only place with prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from xeco_convert.commandline.run import run_command

from .evaluate import eval_command
from .heal import distill_command
from .recipes import recipes_command

COMMANDS = click.Group(commands={"eval": eval_command, "recipes": recipes_command})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the command that the first argument names, else healing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in COMMANDS.commands:
        run_command(COMMANDS.commands[name], given[1:], f"xeco-distill {name}")
    else:
        run_command(distill_command, given, "xeco-distill")

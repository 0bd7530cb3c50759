"""The command `xeco-convert`: argv -> options -> call, one module for each command. The only place with prints and exit codes.

Imports torch and transformers only where a command needs them, so that --help answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from xeco_convert.cli.convert import convert_command
from xeco_convert.cli.export import export_command
from xeco_convert.cli.inspect import inspect_command
from xeco_convert.cli.refresh import refresh_command
from xeco_convert.cli.sweep import sweep_command
from xeco_convert.commandline.run import run_named

COMMANDS = click.Group(
    commands={
        "inspect": inspect_command,
        "sweep": sweep_command,
        "export": export_command,
        "refresh": refresh_command,
    }
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the command that the first argument names, else the conversion."""
    run_named(COMMANDS.commands, convert_command, arguments, "xeco-convert")

"""Runs a command so that every foreseen failure is one sentence on stderr and an exit code; shared by both commands."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import click

from xeco_convert.errors import XecoError


def run_command(command: click.Command, arguments: list[str], name: str) -> None:
    """Run a click command; every foreseen failure becomes one sentence on stderr and exit code 1 or 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated run cleans up as Ctrl-C does
    try:
        sys.exit(command.main(args=arguments, prog_name=name, standalone_mode=False) or 0)
    except XecoError as error:
        _fail(name, str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(name, "interrupted; nothing was written.", 1)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(name: str, sentence: str, code: int) -> None:
    click.echo(f"{name}: {sentence}", err=True)
    sys.exit(code)

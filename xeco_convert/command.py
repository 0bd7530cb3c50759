"""Runs a command so that every foreseen failure is one sentence on stderr and an exit code; shared by both commands."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from xeco_convert.errors import XecoError

_INTERRUPTED = "interrupted; nothing was written."


def run_command(command: click.Command, arguments: list[str], name: str, *, interrupted: str = _INTERRUPTED) -> None:
    """Run a click command; every foreseen failure becomes one sentence on stderr and exit code 1 or 2.

    `interrupted`: what to say after Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch loads. By default a thread that waits for the others keeps its core busy, and where another process wants
    # that core, each of the many small products of a layer waits for it: 40 s instead of 4 for a tiny model, 12 times the CPU
    # time. Asleep, two threads are at least as fast as one. How many threads there are stays the user's.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    interrupts = _take_interrupts()
    try:
        sys.exit(command.main(args=arguments, prog_name=name, standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.Abort):
        _fail(name, interrupted, 1)
    except Exception as error:
        if interrupts:  # libraries turn an interrupt that reaches them into errors of their own
            _fail(name, interrupted, 1)
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if not isinstance(error, XecoError):
            raise
        _fail(name, str(error), error.exit_code)


def _take_interrupts() -> list[int]:
    """Make SIGTERM clean up as Ctrl-C does; the list fills with the signals that come."""
    interrupts: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background, or under nohup
            signal.signal(number, interrupt)
    return interrupts


def _fail(name: str, sentence: str, code: int) -> NoReturn:
    click.echo(f"{name}: {sentence}", err=True)
    sys.exit(code)

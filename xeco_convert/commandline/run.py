"""Runs a command so that every foreseen failure is one sentence on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from xeco_convert.errors import XecoError
from xeco_convert.memory import keep_freed_memory

# A signal that comes so soon after another is the same wish: `timeout`, torchrun and terminals tell a process twice.
SAME_WISH_SECONDS = 1.0


class Interrupts:
    """Signals that came, and what to say of them."""

    def __init__(self, sentence: str | Callable[[], str]) -> None:
        self.sentence = sentence
        self.came = False
        self._last = -SAME_WISH_SECONDS

    def take(self) -> None:
        """Make SIGTERM clean up as Ctrl-C does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background, or under nohup
                signal.signal(number, self._interrupt)

    def said(self) -> str:
        """What is true at this moment."""
        return self.sentence if isinstance(self.sentence, str) else self.sentence()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < SAME_WISH_SECONDS:
            return  # cleaning up is not to be interrupted
        self.came, self._last = True, now
        raise KeyboardInterrupt


def run_command(command: click.Command, arguments: list[str], name: str) -> None:
    """Run a click command; every foreseen failure becomes one sentence on stderr and exit code 1 or 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    share_cores()
    keep_freed_memory()
    interrupts = Interrupts("interrupted; nothing was written.")
    interrupts.take()
    try:
        sys.exit(command.main(args=arguments, prog_name=name, standalone_mode=False, obj=interrupts) or 0)
    except (KeyboardInterrupt, click.Abort):
        _fail(name, interrupts.said(), 1)
    except Exception as error:
        if interrupts.came:  # libraries turn an interrupt that reaches them into errors of their own
            _fail(name, interrupts.said(), 1)
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if not isinstance(error, XecoError):
            raise
        _fail(name, str(error), error.exit_code)


def share_cores() -> None:
    """Let threads that wait for the others sleep, after a moment, unless the user says how they wait. Read when torch loads.

    By default they keep their core busy, and where another process wants it, each of the many small products of a layer waits
    for that one: 154 s instead of 32 for a tiny model on a busy machine of two cores. Asleep at once, they are woken for every
    step of a decomposition: an eigenvalue problem of 384 rows took 62 ms instead of 12, and 19 with one thread. Two thousand
    rounds are tens of microseconds. How many threads there are stays the user's.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def run_named(
    commands: Mapping[str, click.Command], default: click.Command, arguments: Sequence[str] | None, name: str
) -> None:
    """Run the command that the first argument names, else `default`; without `arguments` those of this process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = given[0] if given else ""
    if first in commands:
        run_command(commands[first], given[1:], f"{name} {first}")
    else:
        run_command(default, given, name)


def say_when_interrupted(sentence: str | Callable[[], str]) -> None:
    """What the running command says after Ctrl-C and SIGTERM: what is kept, and how to go on. A function gives what is true
    when it is called."""
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.obj, Interrupts):
        context.obj.sentence = sentence


def when_interrupted(output: Path, rest: str) -> Callable[[], str]:
    """What to say after Ctrl-C, which may come when all is done but the report. `rest` ends the sentence that says that nothing
    was written: what is left of the run."""
    written = Replaced(output)
    return lambda: (
        f"interrupted; {output} was written whole, only the report was not."
        if written
        else f"interrupted; nothing was written{rest}"
    )


class Replaced:
    """Whether a folder is another one than it was before, or there at last."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, _identity(folder)

    def __bool__(self) -> bool:
        return _identity(self._folder) not in (None, self._before)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _fail(name: str, sentence: str, code: int) -> NoReturn:
    try:
        click.echo(f"{name}: {sentence}", err=True)
    except OSError:  # whoever read it is gone
        pass
    sys.exit(code)

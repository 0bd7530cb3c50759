"""How far a long run is, on stderr: a bar with the time left on a terminal, plain lines anywhere else (Slurm, CI, nohup, a
file). Shared by both commands."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import click

_MOST_SECONDS = 30.0  # between two lines
_LEAST_SECONDS = 1.0  # between two lines of a stage: one for each tenth of a short run would be noise
_CHECK_SECONDS = 5.0


class Report(Protocol):
    """What is being done, the share that is done (of the run, or of the stage), and figures of the moment."""

    def __call__(self, what: str, share: float, figures: Mapping[str, float] = ..., /) -> None: ...


@contextmanager
def progress(quiet: bool, *, by_stage: bool = False) -> Iterator[Report | None]:
    """Shows what is reported to it. `by_stage`: whether shares, and the time left, are those of each stage (whatever has
    another name is another stage), instead of the whole run's. Nothing where `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
        with _bar(by_stage) as report:
            yield report
    else:
        with _lines(by_stage) as report:
            yield report


@contextmanager
def _bar(by_stage: bool) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TaskProgressColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task, stage = bar.add_task("", total=1.0), ""

        def report(what: str, share: float, figures: Mapping[str, float] | None = None, /) -> None:
            nonlocal task, stage
            if by_stage and what != stage:  # the time left is that of the stage
                bar.remove_task(task)
                task, stage = bar.add_task(what, total=1.0), what
            bar.update(task, description=_in_words(what, figures), completed=share)

        yield report


@contextmanager
def _lines(by_stage: bool) -> Iterator[Report]:
    lines, over = ProgressLines(lambda line: click.echo(line, err=True), by_stage=by_stage), threading.Event()

    def watch() -> None:  # some steps of large models take minutes
        while not over.wait(_CHECK_SECONDS):
            lines.remind()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield lines.report
    finally:
        over.set()
        thread.join()


class ProgressLines:
    """A line at the start, at each tenth or each half minute (whichever comes first), and at the end: time since the start,
    share, time left, what, figures. `say` takes a line, `clock` gives seconds."""

    def __init__(
        self, say: Callable[[str], None], *, by_stage: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._by_stage, self._clock = say, by_stage, clock
        self._began = self._said = clock()
        self._stage: str | None = None
        self._first = (self._began, 0.0)  # when the stage was first heard of, and how far it was then
        self._share, self._said_share = 0.0, 0.0
        self._words = ""
        self._lock = threading.Lock()

    def report(self, what: str, share: float, figures: Mapping[str, float] | None = None, /) -> None:
        """Take note, and say it where a line is due."""
        with self._lock:
            now, stage = self._clock(), what if self._by_stage else ""
            is_new = stage != self._stage
            if is_new:
                self._stage, self._first = stage, (now, share)
            was_over = self._share >= 1 and not is_new
            self._share, self._words = min(max(share, 0.0), 1.0), _in_words(what, figures)
            waited = now - self._said
            further = _tenth(self._share) > _tenth(self._said_share) and waited >= _LEAST_SECONDS
            ended = self._share >= 1 and not was_over
            if is_new or further or ended or waited >= _MOST_SECONDS:
                self._line(now)

    def remind(self) -> None:
        """Say again where things stand, if nothing was said for long."""
        with self._lock:
            now = self._clock()
            if self._stage is not None and self._share < 1 and now - self._said >= _MOST_SECONDS:
                self._line(now)

    def _line(self, now: float) -> None:
        self._said, self._said_share = now, self._share
        line = f"{_duration(now - self._began)}  {self._share:4.0%}  ETA {self._time_left(now):>7}  {self._words}"
        try:
            self._say(line)
        except (OSError, ValueError):  # whoever read it is gone; the run goes on
            self._say = lambda line: None

    def _time_left(self, now: float) -> str:
        began, share = self._first
        if self._share >= 1:
            return _duration(0)
        if self._share <= share or now <= began:
            return "-"
        return _duration((now - began) * (1 - self._share) / (self._share - share))


def _tenth(share: float) -> int:
    return int(10 * share + 1e-9)


def _in_words(what: str, figures: Mapping[str, float] | None) -> str:
    return "  ".join([what, *(f"{name} {value:.4g}" for name, value in (figures or {}).items())])


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

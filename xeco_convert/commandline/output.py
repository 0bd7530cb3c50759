"""What commands print and write beside their main work: tables, warnings, reports in files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from xeco_convert.errors import OutputError, XecoWarning
from xeco_convert.report import format_cell

Command = TypeVar("Command", bound=Callable[..., Any])


def _checked_file(_context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, before any work."""
    if value is not None and not value.absolute().parent.is_dir():
        raise OutputError(f"{parameter.opts[0]}: {value} cannot be written (no such folder); create it first.")
    return value


def file_option(flag: str, name: str, help_text: str) -> Callable[[Command], Command]:
    """An option with a file that the command writes also."""
    kind: Any = click.Path(path_type=Path, dir_okay=False)
    return click.option(flag, name, type=kind, metavar="FILE", help=help_text, callback=_checked_file)


def json_option(help_text: str) -> Callable[[Command], Command]:
    """--json FILE, as `json_file`."""
    return file_option("--json", "json_file", help_text)


quiet_option: Callable[[Any], Any] = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


def write_json(file: Path | None, data: Mapping[str, Any]) -> None:
    """The file of --json, where it was given. Raises `OutputError`."""
    if file is not None:
        write_text("--json", file, json.dumps(data, indent=2) + "\n")


def write_text(flag: str, file: Path, text: str) -> None:
    """The file of an option. Raises `OutputError`."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{flag}: {file} cannot be written ({error.strerror}).") from None


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table on stdout, the same on a terminal and in a file."""
    cells = [list(columns)] + [[format_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        click.echo("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)))


@contextmanager
def own_warnings_last(quiet: bool) -> Iterator[None]:
    """Our own warnings as sentences on stderr, behind the progress bar; those of libraries as always."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", XecoWarning)
            yield
    finally:
        for item in caught:
            if not issubclass(item.category, XecoWarning):
                warnings.showwarning(item.message, item.category, item.filename, item.lineno)
        own = dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, XecoWarning))
        for sentence in own if not quiet else ():
            click.echo(f"warning: {sentence}", err=True)

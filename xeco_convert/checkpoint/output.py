"""Where a checkpoint may be written."""

from __future__ import annotations

from pathlib import Path

from xeco_convert.errors import OptionError, OutputError


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that exists (unless it may be replaced), or that overlaps IN. Raises `OptionError` or `OutputError`."""
    try:
        _check_place(output, source, overwrite=overwrite)
    except OSError as error:  # a folder on the way that may not even be looked into
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another OUT.") from None


def _check_place(output: Path, source: Path, *, overwrite: bool) -> None:
    target = output.absolute()
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise OptionError(
            f"{output}: what is written must lie outside what is read ({source}), which is never changed; choose another folder."
        )
    if target.is_symlink() or target.is_file():
        raise OptionError(f"{output}: expected a folder or nothing, found a file or link; choose another OUT.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise OptionError(f"{output}: exists already; add --overwrite to replace it, or choose another folder.")
    ancestor = next(parent for parent in target.parents if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(f"{output}: cannot be written ({ancestor} is not a folder); choose another OUT.")

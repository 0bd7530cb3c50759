"""The folder of an unfinished run: what is done so far, and whose run it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from xeco_convert import __version__
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import OptionError, OutputError
from xeco_convert.files import write_json_whole

from .options import DistillOptions

# Options that change nothing of what a run computes.
_WITHOUT_INFLUENCE = ("output", "overwrite", "keep_original", "work_dir", "restart", "sample_cache", "device")
_MARKER = "run.json"


class RunFolder:
    """Named results of one run, each there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, fingerprint: str, *, restart: bool) -> bool:
        """Take the folder for this run; whether there was something of it to continue.

        Raises `OptionError` where it holds another run's work, `OutputError` where it cannot be used.
        """
        marker = self.folder / _MARKER
        try:
            if restart and marker.is_file():
                shutil.rmtree(self.folder)
            if self.folder.is_dir() and any(self.folder.iterdir()) and not marker.is_file():
                raise OptionError(
                    f"--work-dir: {self.folder} holds files that are no healing run; choose an empty folder."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            if not marker.is_file():
                self.write_json(_MARKER, {"fingerprint": fingerprint})
                return False
            recorded = json.loads(marker.read_text(encoding="utf-8")).get("fingerprint")
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.folder}: cannot be used for the run ({error}); choose another --work-dir."
            ) from None
        if recorded != fingerprint:
            raise OptionError(
                f"{self.folder}: holds an unfinished run with other options, data or weights; repeat its options to continue "
                "it, add --restart to throw it away, or choose another --work-dir."
            )
        return True

    def path(self, name: str) -> Path:
        """A place below the folder."""
        return self.folder / name

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Keep some facts."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json_whole(target, data)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Facts kept before, or None."""
        file = self.folder / name
        if not file.is_file():
            return None
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return data

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fingerprint(student: CheckpointIndex, teacher: str, options: DistillOptions, world: int) -> str:
    """What the results of a run depend on: weights, teacher, data, options, processes, version."""
    values = {key: value for key, value in options.values().items() if key not in _WITHOUT_INFLUENCE}
    files = {path: path.stat() for path in set(student.files.values())}
    facts = {
        "version": __version__,
        "options": values,
        "teacher": teacher,
        "student": sorted((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()),
        "data": [_file_facts(name) for name in (options.data, options.preferences)],
        "processes": world,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _file_facts(name: str | None) -> tuple[int, int] | None:
    if name is None or not Path(name).is_file():
        return None
    stat = Path(name).stat()
    return stat.st_size, stat.st_mtime_ns

"""Results of a calibration on disk: so that memory stays bounded, and so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from xeco_convert import __version__
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import OptionError, OutputError
from xeco_convert.files import file_identity, write_whole
from xeco_convert.options import ConvertOptions

# Options that change nothing of what is kept here.
_WITHOUT_INFLUENCE = ("overwrite", "dtype", "max_shard_size", "verify", "work_dir", "device")
_FORMAT = 2  # of what is kept: another one's results are not read
_FINGERPRINT_FILE = "run.json"


class WorkFolder:
    """Named results of one run: a folder of the user's (--work-dir), or a temporary one that goes with the object."""

    def __init__(self, folder: str | None, index: CheckpointIndex, options: ConvertOptions) -> None:
        """`folder`: the user's; `index` and `options` say whose results they are."""
        self._temporary: TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = TemporaryDirectory(prefix="xeco-convert-")
            self._folder = Path(self._temporary.name)
            return
        self._folder = Path(folder)
        fingerprint = _fingerprint(index, options)
        marker = self._folder / _FINGERPRINT_FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                marker.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
            recorded = json.loads(marker.read_text(encoding="utf-8")).get("fingerprint")
        except (OSError, ValueError, AttributeError) as error:
            raise OutputError(f"--work-dir: {self._folder} cannot be used ({error}); choose another folder.") from None
        if recorded != fingerprint:
            raise OptionError(
                f"--work-dir: {self._folder} holds results of another source or of other options; "
                "repeat that run's options to continue it, or choose an empty folder."
            )

    def save(self, name: str, data: dict[str, Any]) -> None:
        """Keep a result of tensors and plain values under a name. It is there whole or not at all."""
        target = self._folder / f"{name}.pt"
        try:
            write_whole(target, lambda partial: torch.save(data, partial))
        except (OSError, RuntimeError) as error:
            raise OutputError(f"--work-dir: {target} cannot be written ({error}); free some space.") from None

    def load(self, name: str) -> dict[str, Any] | None:
        """A result kept before, or None."""
        file = self._folder / f"{name}.pt"
        if not file.is_file():
            return None
        try:
            data: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise OutputError(f"--work-dir: {file} is damaged; delete it, and it is computed again.") from None
        return data


def _fingerprint(index: CheckpointIndex, options: ConvertOptions) -> str:
    """What a run's results depend on: source files, options, version."""
    values = options.values()
    files = set(index.files.values())
    if values["calibration"] is not None and Path(values["calibration"]).is_file():
        files.add(Path(values["calibration"]))
    facts = {
        "format": _FORMAT,
        "version": __version__,
        "config": dict(index.config),
        "files": {name: (size, time) for name, size, time in map(file_identity, files)},
        "options": {name: value for name, value in values.items() if name not in _WITHOUT_INFLUENCE},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

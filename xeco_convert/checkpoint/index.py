"""What a source checkpoint holds, from config.json and the headers of its safetensors files; no weight is read here."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xeco_convert.checkpoint.companions import DOWNLOAD_PATTERNS, companion_files
from xeco_convert.checkpoint.dtypes import DTYPE_BYTES
from xeco_convert.errors import CheckpointError, reason_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_HUB_PATTERNS = (*DOWNLOAD_PATTERNS, "*.safetensors", INDEX_FILE)


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor as a header describes it; `dtype` in safetensors' words (F32, BF16, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """A source checkpoint: folder, contents of config.json, the header of every tensor and the file that holds it.

    `stored_names`: the name that the file has for a tensor, where it is kept under another one here.
    """

    folder: Path
    hub_id: str | None
    revision: str | None
    config: Mapping[str, Any]
    headers: Mapping[str, TensorHeader]
    files: Mapping[str, Path]
    stored_names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> CheckpointIndex:
        """Index a local folder or a hub id (taken from huggingface_hub's cache, downloaded where it may be).

        Raises `CheckpointError` with the fault: no such folder or repository, no or broken config.json, pickled weights,
        a damaged or missing weight file, an index that names a file outside the folder or a tensor that is not there, an
        adapter beside the weights.
        """
        folder, hub_id, commit = _locate(source, revision)
        config = _read_config(folder)
        headers: dict[str, TensorHeader] = {}
        files: dict[str, Path] = {}
        weight_map = _weight_map(folder)
        for file in sorted(set(weight_map.values())) if weight_map else [folder / SINGLE_FILE]:
            for header in _read_headers(file):
                if weight_map and weight_map.get(header.name) != file:
                    continue  # a tensor that the index does not assign to this file: stale, and never loaded
                headers[header.name], files[header.name] = header, file
        for name, file in weight_map.items():
            if name not in headers:
                raise CheckpointError(
                    f"{INDEX_FILE} says that {name} is in {file.name}, where it is not; download {folder} again."
                )
        return cls(folder=folder, hub_id=hub_id, revision=commit, config=config, headers=headers, files=files)

    @classmethod
    def without_weights(cls, source: str | Path, revision: str | None = None) -> CheckpointIndex:
        """The same with no tensor in it: of a hub id only the small files are taken. Raises `CheckpointError`."""
        folder, hub_id, commit = _locate(source, revision, DOWNLOAD_PATTERNS)
        config = read_json(folder / "config.json")
        return cls(folder=folder, hub_id=hub_id, revision=commit, config=config, headers={}, files={})

    def companion_files(self) -> list[Path]:
        """Tokenizer, chat template, generation settings and licences, relative to the folder, in a fixed order."""
        return companion_files(self.folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` where it is missing or none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; expected a Hugging Face checkpoint folder with {path.name}."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected JSON, found what cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:  # no JSON or no UTF-8; numbers or nesting beyond what Python reads
        raise CheckpointError(
            f"{path}: expected JSON, found something else ({error}); download the file again."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}; download the file again.")
    return data


def _locate(
    source: str | Path, revision: str | None, patterns: Sequence[str] = _HUB_PATTERNS
) -> tuple[Path, str | None, str | None]:
    """Folder of a source, and its hub id and commit where it is one; `patterns`: the files that are wanted of a hub id."""
    folder = Path(source)
    if os.path.isdir(folder):  # False as well for what cannot be a name
        return folder.resolve(), None, None
    name = str(source)
    if os.path.exists(folder) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        what = "a file" if os.path.exists(folder) else "nothing"
        raise CheckpointError(
            f"{source}: expected a checkpoint folder, found {what}; give the folder that holds config.json."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"{source}: neither a folder nor a model that the Hugging Face hub or its cache has ({reason}); "
            "check the path, or the id and your login."
        ) from None
    return snapshot, name, snapshot.name


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model alone: an adapter beside it would be part of what transformers loads, and of nothing that is read
    from the weights."""
    if os.path.isfile(folder / ADAPTER_FILE):  # False as well where the folder may not be looked into
        raise CheckpointError(
            f"{folder}: found {ADAPTER_FILE}, which transformers loads as a PEFT adapter on top of the weights; expected a model "
            "alone. Merge it first (PeftModel.merge_and_unload, then save_pretrained to a new folder), or move it elsewhere."
        )
    return read_json(folder / "config.json")


def _weight_map(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from the index of a sharded checkpoint; empty for a single file."""
    if (folder / SINGLE_FILE).is_file():
        return {}
    if not (folder / INDEX_FILE).is_file():
        raise _no_weights(folder)
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE}: expected a weight_map, found none; download the file again.")
    for name, file in weight_map.items():
        # A plain name in the same folder: anything else could make us read (or trust) files that are not the model's.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / INDEX_FILE}: {name} points to {file!r}, outside the checkpoint folder; "
                "expected the name of a file beside the index."
            )
    return {name: folder / file for name, file in weight_map.items()}


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        kind = "MultimodalLM" if "text_config" in _read_config(folder) else "CausalLM"
        return CheckpointError(
            f"{folder}: found pickled weights ({pickles[0]}), which are never loaded; expected {SINGLE_FILE}. Convert them "
            f'first: AutoModelFor{kind}.from_pretrained(folder, dtype="auto").save_pretrained(new_folder).'
        )
    return CheckpointError(
        f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither; give a whole checkpoint folder."
    )


def _read_headers(file: Path) -> list[TensorHeader]:
    """Headers of one safetensors file, in the order of its data."""
    _check_frame(file)
    try:
        with safe_open(file, framework="np") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.offset_keys()]
            headers = [TensorHeader(name=n, dtype=s.get_dtype(), shape=tuple(s.get_shape())) for n, s in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); download it again.") from None
    for header in headers:
        if header.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{file}: {header.name} has the dtype {header.dtype}, expected one of {', '.join(DTYPE_BYTES)}."
            )
    return headers


def _check_frame(file: Path) -> None:
    """Whether the file can hold the header that it announces: clearer words than the library's for the common damages."""
    if not os.path.isfile(file):  # False as well for what cannot be a name
        raise CheckpointError(f"{file}: not found, although the index names it; download the checkpoint again.")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions.") from None
    if len(start) < 8:
        raise CheckpointError(f"{file}: truncated: {size} bytes, expected a safetensors header; download it again.")
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: the header claims {header_bytes} bytes, expected at most {_MAX_HEADER_BYTES}; this is no safetensors file."
        )
    if 8 + header_bytes > size:
        raise CheckpointError(
            f"{file}: truncated: the header needs {8 + header_bytes} bytes, the file has {size}; download it again."
        )

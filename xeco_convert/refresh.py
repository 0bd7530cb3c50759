"""Renews what an older version wrote beside the weights: code files, entries of config.json, tokenizer. Weights stay.

Everything is prepared in a temporary folder beside the checkpoint, then put in place file by file, config.json last; where
that fails half way, what was there comes back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert import __version__
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.checkpoint.companions import TOKENIZER_CONFIG, tokenizer_files
from xeco_convert.checkpoint.format import EXPORT_REPORT_FILE, FORMAT_VERSION
from xeco_convert.checkpoint.index import read_json
from xeco_convert.conversion import model_identity, wrapper_identity
from xeco_convert.errors import CheckpointError, OptionError, OutputError, XecoWarning
from xeco_convert.families import WRAPPERS, FamilySpec, supported_model_types
from xeco_convert.layer_entries import converted_text, mla_layer
from xeco_convert.modeling import code_files
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX
from xeco_convert.tokenizer import TokenizerFiles, keep_tokenizer


@dataclass(frozen=True, kw_only=True)
class RefreshReport:
    """What `refresh` did: files changed, added and removed, and in one sentence why the tokenizer was left out, if it was."""

    folder: str
    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    tokenizer_left: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return dataclasses.asdict(self)


def refresh_checkpoint(folder: str | Path, source: str | Path | None = None) -> RefreshReport:
    """Bring a converted (or healed) folder to what this version writes beside the same weights.

    The tokenizer is compared with the source's, which config.json records; `source` says where it lies now. Where it is not
    to be had, the tokenizer is left, and the report says so. A second run changes nothing.

    Raises `CheckpointError` for a folder that xeco-convert did not convert, or of a newer format; `OptionError` where
    `source` is another model; `OutputError` where a file cannot be written, and then nothing is changed.
    """
    place = Path(folder).absolute()
    config = read_json(place / "config.json")
    family = _family(place, config)
    origin, missing = _source(config, source, family)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.refresh-", dir=place.parent) as prepared:
            new = Path(prepared) / "new"
            new.mkdir()
            _prepare(place, new, config, family)
            left = missing if origin is None else _renew_tokenizer(origin, new, place)
            report = _compare(place, new, left)
            if report.changed or report.added or report.removed:
                _write_config(new, _stamped(read_json(new / "config.json")))
                report = _compare(place, new, left)
                _put_in_place(place, new, report, Path(prepared) / "old")
    except OSError as error:
        raise OutputError(f"{place}: cannot be written ({error.strerror}); nothing was changed there.") from None
    return report


def _family(folder: Path, config: Mapping[str, Any]) -> FamilySpec:
    """The family that a converted folder came from. Raises `CheckpointError` for any other folder."""
    if (folder / EXPORT_REPORT_FILE).is_file():
        raise CheckpointError(
            f"{folder}: is an export, which holds no code to renew; refresh the converted folder, then export that again."
        )
    model_type, text = str(config.get("model_type")), converted_text(config)
    family = supported_model_types().get(str(text.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    if not model_type.startswith(MODEL_TYPE_PREFIX) or family is None or not isinstance(text.get("mla_layers"), list):
        raise CheckpointError(
            f"{folder}: expected a checkpoint converted by xeco-convert, found model_type {model_type!r}; convert it first."
        )
    found = _conversion(config).get("format_version", FORMAT_VERSION)
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: config.json: conversion.format_version: expected at most {FORMAT_VERSION}, found {found!r}; it was "
            "written by a newer xeco-convert, update this one."
        )
    return family


def _conversion(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("conversion")
    return found if isinstance(found, dict) else {}


def _source(
    config: Mapping[str, Any], given: str | Path | None, family: FamilySpec
) -> tuple[CheckpointIndex | None, str | None]:
    """The source's small files, or one sentence why they are not to be had. Raises where `given` is no such source."""
    recorded = _conversion(config).get("source")
    recorded = recorded if isinstance(recorded, dict) else {}
    path = given or recorded.get("path")
    if not path:
        return None, "config.json records no source; give --source IN, the model that was converted."
    try:
        index = CheckpointIndex.without_weights(path, None if given else recorded.get("revision"))
    except CheckpointError as error:
        if given:
            raise OptionError(f"--source: {error}") from None
        return None, f"{error} If the source lies elsewhere now, give --source IN."
    found, expected = index.config.get("model_type"), _wrapped_type(config) or family.model_type
    if found != expected:
        sentence = f"{path}: expected the {expected} model that was converted, found model_type {found!r}"
        if given:
            raise OptionError(f"--source: {sentence}; give the model that config.json records: {recorded.get('path')}.")
        return None, f"{sentence}; give --source IN."
    return index, None


def _prepare(folder: Path, new: Path, config: Mapping[str, Any], family: FamilySpec) -> None:
    """All that is renewed from the folder itself: code files and config.json; the tokenizer's files as they are."""
    for name, file in code_files().items():
        shutil.copyfile(file, new / name)
    for relative in tokenizer_files(folder):
        _copy(folder / relative, new / relative)
    _write_config(new, _renewed_config(folder, config, family))


def _renewed_config(folder: Path, config: Mapping[str, Any], family: FamilySpec) -> dict[str, Any]:
    """config.json as this version writes it for these weights."""
    text = converted_text(config)
    entries = enumerate(text["mla_layers"])
    layers = [None if entry is None else mla_layer(number, entry).to_dict() for number, entry in entries]
    conversion = {"format_version": FORMAT_VERSION, **_conversion(config)}
    renewed = {**text, **model_identity(family), "mla_layers": layers}
    wrapper = _wrapped_type(config)
    if wrapper is not None:
        renewed = {**config, **wrapper_identity(wrapper, WRAPPERS[wrapper]), "text_config": renewed}
    return {**renewed, "conversion": {**conversion, "format_version": FORMAT_VERSION}}


def _wrapped_type(config: Mapping[str, Any]) -> str | None:
    """model_type of the source, where it is a model around a text model."""
    own = str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX)
    return own if own in WRAPPERS else None


def _stamped(config: dict[str, Any]) -> dict[str, Any]:
    """The same, saying who renewed it."""
    return {**config, "conversion": {**_conversion(config), "refreshed": f"xeco-convert {__version__}"}}


def _renew_tokenizer(source: CheckpointIndex, new: Path, folder: Path) -> str | None:
    """Make the files in `new` give the source's ids, first with what the folder had: it may hold a chat template of its own.

    Gives one sentence where the source's tokenizer cannot be compared."""
    place = TokenizerFiles.of(source)
    for relative in tokenizer_files(source.folder):
        if not (new / relative).exists() and not _is_superseded(relative, new):
            _copy(source.folder / relative, new / relative)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", XecoWarning)
        try:
            keep_tokenizer(place, new, settings=False)
        except CheckpointError:
            for relative in tokenizer_files(folder):
                (new / relative).unlink()
            for relative in tokenizer_files(source.folder):
                _copy(source.folder / relative, new / relative)
            keep_tokenizer(place, new)
    said = [str(item.message) for item in caught if issubclass(item.category, XecoWarning)]
    return said[0] if said else None


def _is_superseded(relative: Path, new: Path) -> bool:
    """Whether a file of the source is one whose words the folder holds in a newer place: it would be read on top of them."""
    return (
        relative.suffix == ".json"
        and relative.name in ("special_tokens_map.json", "added_tokens.json")
        and (new / TOKENIZER_CONFIG).exists()
    )


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _compare(folder: Path, new: Path, tokenizer_left: str | None) -> RefreshReport:
    """What has to change in `folder` to hold what is in `new`. JSON that says the same counts as unchanged."""
    files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    present = [relative for relative in files if (folder / relative).is_file()]
    return RefreshReport(
        folder=str(folder),
        changed=tuple(str(name) for name in present if not _same(folder / name, new / name)),
        added=tuple(str(name) for name in files if name not in present),
        removed=tuple(str(name) for name in tokenizer_files(folder) if name not in files),
        tokenizer_left=tokenizer_left,
    )


def _same(first: Path, second: Path) -> bool:
    if first.read_bytes() == second.read_bytes():
        return True
    return first.name == "config.json" and read_json(first) == read_json(second)


def _put_in_place(folder: Path, new: Path, report: RefreshReport, old: Path) -> None:
    """Replace file by file, config.json last; on any failure, Ctrl-C included, put back what was there."""
    names = [name for name in (*report.added, *report.changed) if name != "config.json"]
    order = [*names, *(["config.json"] if "config.json" in report.changed else [])]
    for name in (*order, *report.removed):
        if (folder / name).is_file():
            _copy(folder / name, old / name)
    try:
        for name in order:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
        for name in report.removed:
            (folder / name).unlink()
    except BaseException:
        _put_back(folder, old, (*order, *report.removed))
        raise


def _put_back(folder: Path, old: Path, names: Sequence[str]) -> None:
    for name in names:
        if (old / name).is_file():
            os.replace(old / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)

"""What a converted checkpoint is, from its config.json and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import DTYPE_BYTES
from xeco_convert.checkpoint.dtypes import STORED_AS
from xeco_convert.checkpoint.format import REPORT_FILE
from xeco_convert.checkpoint.index import read_json
from xeco_convert.errors import CheckpointError, shown
from xeco_convert.families import supported_model_types
from xeco_convert.layer_entries import converted_text, mla_layer
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX
from xeco_convert.pretrained import read_config

_ERRORS = ("key_error", "value_error")


def inspect_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Source, initialisation, cache sizes and one entry per layer, as JSON types.

    Raises `CheckpointError` where `folder` is no checkpoint that xeco-convert wrote.
    """
    config = read_json(Path(folder) / "config.json")
    model_type = config.get("model_type")
    text = converted_text(config)
    family = supported_model_types().get(str(text.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    entries = text.get("mla_layers")
    if not str(model_type).startswith(MODEL_TYPE_PREFIX) or family is None or not isinstance(entries, list):
        raise CheckpointError(
            f"{folder}: expected a checkpoint converted by xeco-convert, found model_type {shown(model_type)}."
        )
    values = read_config(config, Path(folder) / "config.json").get_text_config().to_dict()
    if len(entries) != values["num_hidden_layers"]:
        raise CheckpointError(
            f"{folder}: config.json has {values['num_hidden_layers']} layers, but {len(entries)} entries in mla_layers; take the "
            "folder as xeco-convert wrote it."
        )
    width = family.geometry(values).cache_width
    kept = [
        0 if entry is None and family.keeps_windows and family.window(values, number) is not None else width
        for number, entry in enumerate(entries)
    ]
    report = _report(Path(folder))
    stated = DTYPE_BYTES[STORED_AS.get(str(config.get("dtype") or config.get("torch_dtype")), "F32")]
    number_bytes = report.number_bytes or stated  # config.json may leave the dtype out; the report never does
    layers = [_layer(number, entry, kept[number], number_bytes, report.errors) for number, entry in enumerate(entries)]
    conversion = conversion_record(config)
    return {
        "model_type": model_type,
        "text_model_type": str(text["model_type"]),  # another one where the text model is part of a larger one
        "init": conversion["options"].get("init", "unknown initialisation"),
        "tool": conversion.get("tool", "an unknown version"),
        "source": conversion["source"] or {"path": "an unrecorded source", "revision": None},
        "layers": layers,
        "kv_bytes_before": sum(kept) * number_bytes,
        "kv_bytes_after": sum(layer["kv_bytes_after"] for layer in layers),
    }


def conversion_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json records of the conversion, its source and options empty where it is silent. Raises `CheckpointError`."""
    record = config.get("conversion") or {}
    parts = {name: record.get(name) or {} for name in ("source", "options")} if isinstance(record, Mapping) else {}
    names = ("path", "revision", "model_type")
    if not parts or not all(isinstance(part, Mapping) for part in parts.values()):
        raise CheckpointError(
            f"config.json: conversion must be an object with objects source and options, found {shown(record)}; take the folder "
            "as xeco-convert wrote it."
        )
    texts = [*(parts["source"].get(name) for name in names), parts["options"].get("init"), record.get("tool")]
    odd = [text for text in texts if text is not None and not isinstance(text, str)]
    if odd:
        raise CheckpointError(
            f"config.json: conversion holds {shown(odd[0])} where a text belongs; take the folder as xeco-convert wrote it."
        )
    return {**record, **parts}


def _layer(
    number: int,
    entry: dict[str, Any] | None,
    kept: int,
    number_bytes: int,
    errors: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    if entry is None:
        return {"layer": number, "kv_numbers_after": kept, "kv_bytes_after": kept * number_bytes}
    widths = mla_layer(number, entry)
    cached = {"kv_numbers_after": widths.cache_width, "kv_bytes_after": widths.cache_bytes(number_bytes)}
    bits = {"latent_bits": widths.latent_bits, "rope_bits": widths.rope_bits, "bits": widths.bits_in_words}
    return {"layer": number, **widths.to_dict(), **bits, **cached, **errors.get(number, {})}


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What the conversion's report adds: errors by layer, and bytes of a cached number where it says so."""

    errors: Mapping[int, Mapping[str, Any]]
    number_bytes: int | None


def _report(folder: Path) -> _Report:
    """The conversion's report; a checkpoint saved again by transformers has none."""
    if not (folder / REPORT_FILE).is_file():
        return _Report(errors={}, number_bytes=None)
    data = read_json(folder / REPORT_FILE)
    rows, number_bytes = data.get("layers", []), data.get("kv_bytes_per_number")
    sound = isinstance(rows, list) and all(isinstance(row, Mapping) and _is_sound(row) for row in rows)
    if not sound or number_bytes not in (None, 2, 4):
        raise CheckpointError(
            f"{folder / REPORT_FILE}: not a report that xeco-convert wrote; delete it, or take the folder as it was written."
        )
    errors = {row["layer"]: {key: row.get(key) for key in _ERRORS} for row in rows}
    return _Report(errors=errors, number_bytes=number_bytes)


def _is_sound(row: Mapping[str, Any]) -> bool:
    numbers = [row.get(key) for key in _ERRORS]
    return type(row.get("layer")) is int and all(n is None or type(n) in (int, float) for n in numbers)

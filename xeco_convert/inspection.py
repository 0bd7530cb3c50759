"""What a converted checkpoint is, from its config.json and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import DTYPE_BYTES
from xeco_convert.checkpoint.index import read_json
from xeco_convert.conversion import REPORT_FILE
from xeco_convert.errors import CheckpointError
from xeco_convert.families import supported_model_types
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX, MlaLayer
from xeco_convert.options import DTYPES
from xeco_convert.pretrained import read_config

_BYTES_OF_DTYPE = dict(zip(DTYPES, (DTYPE_BYTES["F32"], DTYPE_BYTES["BF16"], DTYPE_BYTES["F16"]), strict=True))


def inspect_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Source, initialisation, cache sizes and one entry per layer, as JSON types.

    Raises `CheckpointError` where `folder` is no checkpoint that xeco-convert wrote.
    """
    config = read_json(Path(folder) / "config.json")
    model_type = str(config.get("model_type"))
    text = converted_text(config)
    family = supported_model_types().get(str(text.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    entries = text.get("mla_layers")
    if not model_type.startswith(MODEL_TYPE_PREFIX) or family is None or not isinstance(entries, list):
        raise CheckpointError(
            f"{folder}: expected a checkpoint converted by xeco-convert, found model_type {model_type!r}."
        )
    values = read_config(config, Path(folder) / "config.json").get_text_config().to_dict()
    width = family.geometry(values).cache_width
    kept = [
        0 if entry is None and family.window(values, number) is not None else width
        for number, entry in enumerate(entries)
    ]
    report = _report(Path(folder))
    errors = {row["layer"]: {key: row[key] for key in ("key_error", "value_error")} for row in report.get("layers", [])}
    layers = [_layer(number, entry, kept[number], errors.get(number, {})) for number, entry in enumerate(entries)]
    stated = _BYTES_OF_DTYPE.get(str(config.get("dtype") or config.get("torch_dtype")), DTYPE_BYTES["F32"])
    number_bytes = report.get(
        "kv_bytes_per_number", stated
    )  # config.json may leave the dtype out; the report never does
    conversion = config.get("conversion") or {}
    return {
        "model_type": model_type,
        "text_model_type": str(text["model_type"]),  # another one where the text model is part of a larger one
        "init": (conversion.get("options") or {}).get("init", "unknown initialisation"),
        "tool": conversion.get("tool", "an unknown version"),
        "source": conversion.get("source") or {"path": "an unrecorded source", "revision": None},
        "layers": layers,
        "kv_bytes_before": sum(kept) * number_bytes,
        "kv_bytes_after": sum(layer["kv_numbers_after"] for layer in layers) * number_bytes,
    }


def converted_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a converted config.json that the text model is described by: text_config of a model around one."""
    text = config.get("text_config")
    return text if "mla_layers" not in config and isinstance(text, Mapping) else config


def _layer(number: int, entry: dict[str, Any] | None, kept: int, errors: dict[str, Any]) -> dict[str, Any]:
    if entry is None:
        return {"layer": number, "kv_numbers_after": kept}
    try:
        widths = MlaLayer.from_dict(entry)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: layer {number}: {error}.") from None
    return {"layer": number, **widths.to_dict(), "kv_numbers_after": widths.cache_width, **errors}


def _report(folder: Path) -> dict[str, Any]:
    """The conversion's report; a checkpoint saved again by transformers has none."""
    return read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}

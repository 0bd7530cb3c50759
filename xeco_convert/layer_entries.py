"""Entries of mla_layers in a converted config.json: where they are, and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xeco_convert.errors import CheckpointError
from xeco_convert.modeling import MlaLayer


def mla_layer(number: int, entry: Mapping[str, Any]) -> MlaLayer:
    """The widths in the entry of layer `number`. Raises `CheckpointError` where it is none."""
    try:
        return MlaLayer.from_dict(entry)
    except ValueError as error:
        raise CheckpointError(f"config.json: layer {number}: {error}.") from None


def converted_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a converted config.json that the text model is described by: text_config of a model around one."""
    text = config.get("text_config")
    return text if "mla_layers" not in config and isinstance(text, Mapping) else config

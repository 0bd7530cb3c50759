"""Options as fields of frozen dataclasses: one field is one flag is one help line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from xeco_convert.errors import OptionError


def option(
    help_text: str | Callable[[], str],
    default: Any = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    *,
    recorded: bool = False,
) -> Any:
    """A field that is a flag. Help and choices may be functions, where they follow from a registry. `recorded`: config.json of
    the output says its value."""
    metadata = {"help": help_text, "metavar": metavar, "choices": choices, "recorded": recorded}
    return dataclasses.field(default=default, metadata=metadata)


def help_of(item: dataclasses.Field[Any]) -> str:
    """The help line of an option."""
    text = item.metadata["help"]
    return text() if callable(text) else str(text)


def choices_of(item: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that an option may have; empty where they are not a list."""
    choices = item.metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


def option_fields(owner: type) -> dict[str, dataclasses.Field[Any]]:
    """The options that a dataclass declares, by name, in their order."""
    return {item.name: item for item in dataclasses.fields(owner) if "help" in item.metadata}


def default_of(item: dataclasses.Field[Any]) -> Any:
    """What an option is where it is not given; None where it has to be, or is chosen by the program."""
    return None if item.default is dataclasses.MISSING else item.default


def flag_of(name: str) -> str:
    """--kv-size for kv_size."""
    return f"--{name.replace('_', '-')}"


def options_of(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are options of `owner`."""
    return {name: values[name] for name in option_fields(owner) if name in values}


def require(holds: bool, flag: str, expected: str, value: object) -> None:
    """Raise `OptionError` unless it holds."""
    if not holds:
        raise OptionError(f"{flag}: expected {expected}, found {value}; change the value.")


def require_at_most(flag: str, value: int | None, limit: int, what: str) -> None:
    """Raise `OptionError` for a width above what the model has; None is left to the program."""
    if value is not None and value > limit:
        raise OptionError(
            f"{flag}: expected at most {limit} ({what} of this model), found {value}; choose a smaller value."
        )


def parse_share(text: str) -> float:
    """Share in a text such as 25% or 0.25. Raises `OptionError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise OptionError(
            f"--kv-size: expected a share such as 25% or 0.25, at most 100%, found {text!r}; change the value."
        )
    return share

"""Flags of the command line from the options of a conversion: one for each, as they are registered when a command runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import click

from xeco_convert.options import ConvertOptions
from xeco_convert.settings import choices_of, default_of, flag_of, help_of

_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


class OptionsCommand(click.Command):
    """A command with a flag for each of its options, behind its arguments: those that are registered when it is run."""

    def options(self) -> Iterable[dataclasses.Field[Any]]:
        """Those of a conversion."""
        return ConvertOptions.fields().values()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        flags = [_flag(item) for item in self.options()]
        own = super().get_params(ctx)
        arguments = [parameter for parameter in own if isinstance(parameter, click.Argument)]
        return [*arguments, *flags, *(parameter for parameter in own if parameter not in arguments)]


def _flag(field: dataclasses.Field[Any]) -> click.Option:
    flag, choices, default = flag_of(field.name), choices_of(field), default_of(field)
    if field.type == "bool":
        return click.Option([flag], is_flag=True, help=help_of(field))
    return click.Option(
        [flag],
        type=click.Choice(choices) if choices else _TYPES[str(field.type).removesuffix(" | None")],
        default=default,
        show_default=default is not None,
        metavar=field.metadata["metavar"],
        help=help_of(field),
    )

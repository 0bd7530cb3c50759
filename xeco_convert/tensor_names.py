"""Which stored tensor becomes which parameter of a transformers class, by transformers' own rules.

The base model's prefix may be missing or left over, experts may be stored one by one or fused, tensors that a class computes
itself may be there: transformers renames, assembles or passes over them when it loads, and the same functions are asked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import CheckpointIndex, TensorHeader
from xeco_convert.errors import CheckpointError

# Tables that trainers store beside their rotary modules: every class computes its own.
_ROTARY_TABLE = re.compile(r"(^|\.)rotary_emb\.\w+$")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one parameter is loaded from: pairs of (transformers' pattern, stored name), and the operation that puts them
    together; None where the one stored tensor is the parameter."""

    stored: tuple[tuple[str, str], ...]
    converter: Any


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """`headers` and `files` by the name that a tensor is looked for, `stored_names` where the file has another; `parameters`
    by the class's names; `ignored`: stored tensors that the class computes itself; `tied`: pairs of parameters that are one."""

    headers: Mapping[str, TensorHeader]
    files: Mapping[str, Path]
    stored_names: Mapping[str, str]
    parameters: Mapping[str, Parts]
    ignored: tuple[str, ...]
    tied: Mapping[str, str]

    def is_tied(self, name: str) -> bool:
        """Whether a parameter that is not stored is another one that is."""
        pairs = {*self.tied.items(), *((own, other) for other, own in self.tied.items())}
        return any(own == name and other in self.parameters for own, other in pairs)


def resolve_names(index: CheckpointIndex, skeleton: Any) -> TensorNames:
    """Take every stored tensor to the parameter of `skeleton` (a transformers model, without memory) that it is for.

    Raises `CheckpointError` for a tensor that the class has no place for, and where two stored tensors have the same.
    """
    from transformers.core_model_loading import dot_natural_key

    renamer = _Renamer(skeleton)
    headers: dict[str, TensorHeader] = {}
    stored_names: dict[str, str] = {}
    parameters: dict[str, Parts] = {}
    ignored: list[str] = []
    for stored in sorted(index.headers, key=dot_natural_key):
        parameter, name, pattern = renamer.place(stored)
        if parameter not in renamer.state:
            if not renamer.is_ignored(stored, parameter):
                raise _no_place(index, stored, skeleton)
            ignored.append(stored)
            continue
        own = Parts(stored=((pattern or "", name),), converter=renamer.converters.get(pattern))
        before = parameters.get(parameter)
        if name in headers or (before is not None and pattern is None):
            raise CheckpointError(
                f"{index.files[stored]}: {stored} and {stored_names.get(name, name)} are both {parameter} of the model; "
                "download the checkpoint again."
            )
        parameters[parameter] = own if before is None else replace(before, stored=(*before.stored, *own.stored))
        headers[name] = replace(index.headers[stored], name=name)
        if name != stored:
            stored_names[name] = stored
    ordered = _in_file_order(index, headers, stored_names)
    in_files = {
        name: index.stored_names.get(stored_names.get(name, name), stored_names.get(name, name)) for name in ordered
    }
    return TensorNames(
        headers=ordered,
        files={name: index.files[stored_names.get(name, name)] for name in ordered},
        stored_names={name: stored for name, stored in in_files.items() if stored != name},
        parameters=parameters,
        ignored=tuple(name for name in index.headers if name in set(ignored)),
        tied=dict(getattr(skeleton, "all_tied_weights_keys", None) or {}),
    )


class _Renamer:
    """transformers' conversion of names for one model."""

    def __init__(self, skeleton: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(skeleton)
        self.state = skeleton.state_dict()
        self._prefix: str = skeleton.base_model_prefix
        self._wraps = skeleton.get_decoder() is not skeleton.base_model
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters: dict[str | None, Any] = {
            pattern: entry for entry in self._converters for pattern in entry.source_patterns
        }
        patterns = set(skeleton._keys_to_ignore_on_load_unexpected or ())
        # an exception of from_pretrained itself, for classes that compute them
        if any(name.endswith("position_ids") for name, _ in skeleton.named_buffers()):
            patterns.add(r"(^|\.)position_ids$")
        self._ignored = [re.compile(pattern) for pattern in patterns]

    def place(self, stored: str) -> tuple[str, str, str | None]:
        """The parameter that a stored tensor is for, the name to keep it under (its own, with the prefix that the class has),
        and the pattern of the operation that it goes into."""
        from transformers.core_model_loading import rename_source_key

        plain, _ = rename_source_key(stored, [], [], self._prefix, self.state)
        parameter, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self.state)
        if parameter not in self.state and plain in self.state:
            return plain, plain, None
        if self._wraps and pattern is None:  # published files of such models have other names for their parts
            return parameter, parameter, None
        if plain in self.state and pattern is None:
            return parameter, plain, None
        prefix = f"{self._prefix}."
        if parameter.startswith(prefix) and not stored.startswith(prefix):
            return parameter, f"{prefix}{stored}", pattern
        return parameter, stored, pattern

    def is_ignored(self, stored: str, parameter: str) -> bool:
        """Whether transformers passes over a tensor without a warning, or it is a table that the class computes itself."""
        return any(pattern.search(parameter) for pattern in self._ignored) or bool(_ROTARY_TABLE.search(stored))


def _in_file_order(
    index: CheckpointIndex, headers: Mapping[str, TensorHeader], stored_names: Mapping[str, str]
) -> dict[str, TensorHeader]:
    names = {stored_names.get(name, name): name for name in headers}
    return {names[stored]: headers[names[stored]] for stored in index.headers if stored in names}


def _no_place(index: CheckpointIndex, stored: str, skeleton: Any) -> CheckpointError:
    return CheckpointError(
        f"{index.files[stored]}: {stored} is no tensor of a {skeleton.config.model_type} model with this config.json; "
        "converting it unread could change the model. Check that config.json belongs to these weights."
    )

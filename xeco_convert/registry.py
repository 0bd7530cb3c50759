"""Registries: kinds of a thing by name, each of which is a class or an object in a file of its own that says all there is to
know of it.

A registry imports the modules of its package when it is first asked, so that a new kind is one new file. Such modules are
also imported for --help: what takes long to import (torch, transformers) they import where they use it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

from xeco_convert.errors import OptionError

Entry = TypeVar("Entry", bound=Any)


class Registry(Generic[Entry]):
    """Entries by their attribute `name`, those of `package` and those that others add. `without`: modules of the package that
    hold no entry, and take long to import."""

    def __init__(self, package: str, *, without: Collection[str] = ()) -> None:
        self._package = package
        self._without = frozenset(without)
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def add(self, entry: Entry) -> Entry:
        """Register an entry; a decorator of classes. Raises `ValueError` where the name is taken."""
        name: str = entry.name
        if self._entries.get(name, entry) is not entry:
            raise ValueError(f"{self._package}: {name} is registered twice")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry that was added."""
        del self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All names: the lowest `order` first, then by name."""
        return tuple(entry.name for entry in self)

    def find(self, name: str, flag: str) -> Entry:
        """The entry of this name. Raises `OptionError` that names `flag` and all there are."""
        self._load()
        if name not in self._entries:
            raise OptionError(f"{flag}: expected one of {', '.join(self.names())}, found {name}; change the value.")
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: (entry.order, entry.name)))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name not in self._without:
                importlib.import_module(f"{self._package}.{module.name}")

"""Registers the converted families with transformers' Auto classes, without importing transformers.

`import xeco_convert` must make AutoModelForCausalLM know our models, but must not cost the seconds that transformers and
torch take to import: `xeco-convert --help` imports this package as well. So where transformers' Auto classes are not
loaded yet, registration waits for the moment when they are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def register_families() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from xeco_convert.families import supported_model_types
    from xeco_convert.modeling import register

    register([spec.class_prefix for spec in supported_model_types().values()])


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the Auto classes as usual, and registers the families once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Another loader, and the registration after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and others that tools ask a loader for

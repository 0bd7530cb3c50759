"""Makes transformers' Auto classes know the converted families, without importing transformers or building a class.

transformers finds its own models by names: a table says that model_type "llama" has the configuration LlamaConfig, others
which model and tokenizer belong to it, and the module transformers.models.llama is imported when a class is first asked
for. The converted families are entered in the same tables, and `transformers.models.xeco_llama` is a module that makes
its classes when they are asked for. So nothing of transformers is imported but what the user imports: tables that are
loaded get their entries at once, others as soon as they are executed, which adds entries and does nothing else.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
_FAMILY_MODULE = "transformers.models.xeco_"
_MULTIMODAL = "Multimodal"  # MULTIMODAL of xeco_convert.modeling, which imports transformers


def register_families() -> None:
    """Enter the families in the tables that are loaded, and in the others as soon as they are."""
    if any(isinstance(finder, _FamilyFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _FamilyFinder())
    for name, enter in _TABLES.items():
        if name in sys.modules:
            enter(sys.modules[name])


def _families() -> dict[str, tuple[str, str]]:
    """model_type of each source -> model_type of the converted family and prefix of its classes."""
    from xeco_convert.families import supported_model_types

    return {source: (f"xeco_{source}", f"Xeco{spec.class_prefix}") for source, spec in supported_model_types().items()}


def _wrappers() -> dict[str, tuple[str, str]]:
    """The same of the models around text models."""
    from xeco_convert.families import WRAPPERS

    return {source: (f"xeco_{source}", f"Xeco{prefix}{_MULTIMODAL}") for source, prefix in WRAPPERS.items()}


def _all() -> dict[str, tuple[str, str]]:
    return {**_families(), **_wrappers()}


def _enter_configurations(module: Any) -> None:
    module.CONFIG_MAPPING_NAMES.update({own: f"{prefix}Config" for own, prefix in _all().values()})


def _enter_models(module: Any) -> None:
    for own, prefix in _all().values():
        module.MODEL_MAPPING_NAMES[own] = f"{prefix}Model"
    for own, prefix in _families().values():
        module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[own] = f"{prefix}ForCausalLM"
    for own, prefix in _wrappers().values():
        module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[own] = f"{prefix}ForConditionalGeneration"
        module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[own] = f"{prefix}ForConditionalGeneration"
    _enter_backwards(
        module.MODEL_MAPPING, module.MODEL_FOR_CAUSAL_LM_MAPPING, module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )


def _enter_tokenizers(module: Any) -> None:
    """A converted family has the tokenizer of its source, chosen by the same rules."""
    names, distrusted = module.TOKENIZER_MAPPING_NAMES, module.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for source, (own, _) in _all().items():
        if source in names:
            names[own] = names[source]
        if source in distrusted:  # whose tokenizer_config.json transformers does not believe
            distrusted.add(own)
    _enter_backwards(module.TOKENIZER_MAPPING)


def _enter_processors(what: str) -> Callable[[Any], None]:
    """What makes the inputs of a model around a text model is that of its source; `what`: how the tables' names begin."""

    def enter(module: Any) -> None:
        names = getattr(module, f"{what}_MAPPING_NAMES")
        names.update({own: names[source] for source, (own, _) in _wrappers().items() if source in names})
        _enter_backwards(getattr(module, f"{what}_MAPPING"))

    return enter


def _enter_backwards(*mappings: Any) -> None:
    """From classes to model_types: turned round when a mapping is made, which may have been before the families came."""
    for mapping in mappings:
        mapping._reverse_config_mapping.update({f"{prefix}Config": own for own, prefix in _all().values()})


_TABLES: dict[str, Callable[[Any], None]] = {
    f"{_AUTO}.configuration_auto": _enter_configurations,
    f"{_AUTO}.modeling_auto": _enter_models,
    f"{_AUTO}.tokenization_auto": _enter_tokenizers,
    f"{_AUTO}.processing_auto": _enter_processors("PROCESSOR"),
    f"{_AUTO}.image_processing_auto": _enter_processors("IMAGE_PROCESSOR"),
    f"{_AUTO}.video_processing_auto": _enter_processors("VIDEO_PROCESSOR"),
}


class _FamilyFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of the families, and the tables of transformers as usual, which get their entries once executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(_FAMILY_MODULE):
            known = any(fullname == f"transformers.models.{own}" for own, _ in _all().values())
            return importlib.machinery.ModuleSpec(fullname, _FamilyLoader()) if known else None
        if fullname not in _TABLES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(importlib.abc.Loader):
    """Another loader, and the entries after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _TABLES[module.__name__](module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and others that tools ask a loader for


class _FamilyLoader(importlib.abc.Loader):
    """Makes `transformers.models.xeco_llama`, whose classes are those of xeco_convert.modeling, made on first use."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _FamilyModule(spec.name, "A converted family, as transformers looks for it.")

    def exec_module(self, module: ModuleType) -> None:
        pass  # nothing is there until it is asked for


class _FamilyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("Xeco"):
            from xeco_convert.modeling import configuration_xeco, modeling_xeco, modeling_xeco_multimodal

            models = modeling_xeco_multimodal if _MULTIMODAL in name else modeling_xeco
            return getattr(configuration_xeco if name.endswith("Config") else models, name)
        raise AttributeError(f"module {self.__name__} has no attribute {name}")

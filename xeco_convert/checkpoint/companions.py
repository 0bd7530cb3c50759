"""The files beside the weights that a user of the model needs: tokenizer with its code, chat template, settings, licences."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*tekken*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_OTHER_PATTERNS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYING*",
)
# What a download needs for the files that this module finds; which code and lists belong to a tokenizer shows only then.
DOWNLOAD_PATTERNS = (*_TOKENIZER_PATTERNS, *_OTHER_PATTERNS, "README.md", "*.py", "*.json", "*.txt")
# What belongs to the model, whoever names it.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OF_THE_MODEL = ("config.json", "README.md", "model.safetensors.index.json")


def companion_files(folder: Path) -> list[Path]:
    """Everything of a checkpoint folder that is copied as it is, relative to the folder, in a fixed order."""
    names = {path.relative_to(folder) for path in _matching(folder, _OTHER_PATTERNS)}
    return sorted(names | set(tokenizer_files(folder)))


def tokenizer_files(folder: Path) -> list[Path]:
    """Vocabulary, settings, chat templates and code of the tokenizer, relative to the folder; empty where there is none."""
    names = {path.relative_to(folder) for path in _matching(folder, _TOKENIZER_PATTERNS)}
    return sorted(names | set(_referred_files(folder)))


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none that can be read: whoever loads the tokenizer says so."""
    try:
        settings = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def tokenizer_code(settings: dict[str, Any]) -> list[str]:
    """Classes (module.Class) of the tokenizer's own code that tokenizer_config.json names; those of other repositories too."""
    named = settings.get("auto_map")
    if isinstance(named, dict):
        named = named.get("AutoTokenizer")
    entries = named if isinstance(named, list) else [named]
    return [entry for entry in entries if isinstance(entry, str)]


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _referred_files(folder: Path) -> list[Path]:
    """Files of the folder that the tokenizer's settings or code name: modules, and vocabularies under names of their own."""
    settings = tokenizer_settings(folder)
    modules = _with_imports(folder, [f"{name.partition('.')[0]}.py" for name in tokenizer_code(settings)])
    texts = [*_texts(settings), *(text for module in modules for text in _literals(folder / module))]
    return [*modules, *(Path(text) for text in texts if _is_companion(folder, text))]


def _with_imports(folder: Path, names: list[str]) -> list[Path]:
    """These modules of the folder, and those that they import relatively, at any depth."""
    files: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in files and _is_inside(name) and (folder / name).is_file():
            files[name] = Path(name)
            waiting += _relative_imports(folder / name, Path(name).parent)
    return list(files.values())


def _relative_imports(module: Path, parent: Path) -> list[str]:
    files = []
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            parts = [node.module] if node.module else [alias.name for alias in node.names]
            files += [str(parent / f"{part.replace('.', '/')}.py") for part in parts]
    return files


def _literals(module: Path) -> Iterator[str]:
    return (
        node.value
        for node in ast.walk(_parsed(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _parsed(module: Path) -> ast.Module:
    """A module's syntax; an empty one where it has none that can be read: it is copied all the same."""
    try:
        return ast.parse(module.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _is_companion(folder: Path, name: str) -> bool:
    """Whether a text is the name of a file of the folder that is neither weights nor written by a conversion."""
    return (
        _is_inside(name)
        and name not in _OF_THE_MODEL
        and not name.endswith(_WEIGHT_SUFFIXES)
        and (folder / name).is_file()
    )


def _is_inside(name: str) -> bool:
    """Whether a name stays in its folder, and could be one at all."""
    return 0 < len(name) < 200 and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts

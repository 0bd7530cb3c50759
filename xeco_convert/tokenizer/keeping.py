"""Writes the source's tokenizer so that it stays what it is under another model type.

transformers chooses a tokenizer's class, and so how it splits text, by model_type first and by what tokenizer_config.json
names second. A converted model has a model_type of its own: there, the files have to say what the source resolves to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.checkpoint.companions import TOKENIZER_CONFIG, tokenizer_settings
from xeco_convert.checkpoint.index import read_json
from xeco_convert.errors import CheckpointError, XecoWarning
from xeco_convert.tokenizer.loading import TokenizerFiles, quiet
from xeco_convert.tokenizer.probes import first_difference

# The class that reads tokenizer.json as it is, under the name that every version of transformers knows.
_AS_WRITTEN = "PreTrainedTokenizerFast"
# What a class may set, and saving does not write.
_CLASS_SETTINGS = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
# Older places of what tokenizer_config.json says; they would be read on top of it.
_OLDER_FILES = ("special_tokens_map.json", "added_tokens.json")


@contextmanager
def prepared_companions(index: CheckpointIndex, config: Mapping[str, Any], *, stock: bool = False) -> Iterator[Path]:
    """A temporary folder with the companion files of `index` as a checkpoint with this config.json needs them.

    Raises `CheckpointError` where its tokenizer cannot be made to give the same ids as `index`'s: before any long work.
    """
    with tempfile.TemporaryDirectory(prefix="xeco-companions-") as place:
        folder = Path(place)
        for relative in index.companion_files():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(index.folder / relative, folder / relative)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        keep_tokenizer(TokenizerFiles.of(index), folder, stock=stock)
        yield folder


def keep_tokenizer(source: TokenizerFiles, folder: Path, *, settings: bool = True, stock: bool = False) -> None:
    """Change the tokenizer files of `folder`, as little as is needed, until it gives the ids that `source` gives.

    `stock`: for other engines as well, which read tokenizer.json whatever class is named. A source without tokenizer is left
    alone; one that does not load is left as it is, with a warning. Raises `CheckpointError` with the first probe that differs.
    """
    if not source.exists:
        return
    try:
        reference = source.load()
    except CheckpointError as error:
        warnings.warn(f"{error} Its files were copied as they are, their ids not compared.", XecoWarning, stacklevel=2)
        return
    difference = _as_it_is(reference, folder, settings=settings, stock=stock)
    if difference is not None:
        _name_class(folder, _class_name(reference))
        difference = _difference(reference, folder, settings=settings, stock=stock)
    if difference is not None and _has_backend(reference):
        _write_resolved(source, folder)
        difference = _difference(reference, folder, settings=settings, stock=stock)
    if difference is not None:
        raise CheckpointError(
            f"{source.folder}: the tokenizer ({type(reference).__name__}) would read text otherwise in what is written: "
            f"{difference}; save it again with transformers (AutoTokenizer.from_pretrained(IN).save_pretrained), and convert "
            "with those files."
        )


def _as_it_is(reference: Any, folder: Path, *, settings: bool, stock: bool) -> str | None:
    """The first difference of the files as they are. A class that does not say what the source resolves to counts as one,
    even where the ids are the same: another version of transformers might follow it."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    stated = tokenizer_settings(folder).get("tokenizer_class") or _configured(folder)
    found = None if stated is None else tokenizer_class_from_name(str(stated).removesuffix("Fast"))
    name = _AS_WRITTEN if found is None or found.__name__ == "PythonBackend" else _class_name_of(found)
    if name != _class_name(reference):
        return f"tokenizer_class names {stated}"
    return _difference(reference, folder, settings=settings, stock=stock)


def _configured(folder: Path) -> str | None:
    stated = read_json(folder / "config.json").get("tokenizer_class")
    return stated if isinstance(stated, str) else None


def _difference(reference: Any, folder: Path, *, settings: bool, stock: bool) -> str | None:
    """The first difference between the reference and any way in which the folder's tokenizer is loaded."""
    place = TokenizerFiles(folder=folder)
    ways = [place.load, place.load_without_package]
    if _has_backend(reference):
        ways += [place.load_saved_again, *([place.load_backend] if stock else [])]
    for load in ways:
        try:
            found = first_difference(reference, load(), settings=settings)
        except CheckpointError as error:
            return str(error)
        if found is not None:
            return str(found)
    return None


def _has_backend(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast)


def _class_name(tokenizer: Any) -> str:
    return _class_name_of(type(tokenizer))


def _class_name_of(found: type[Any]) -> str:
    return _AS_WRITTEN if found.__name__ == "TokenizersBackend" else found.__name__


def _name_class(folder: Path, name: str) -> None:
    """Put the class's name into tokenizer_config.json, all else as it was."""
    settings = {**tokenizer_settings(folder), "tokenizer_class": name}
    (folder / TOKENIZER_CONFIG).write_text(_json_text(settings), encoding="utf-8")


def _write_resolved(source: TokenizerFiles, folder: Path) -> None:
    """Replace the files by what the source resolves to: its rules whole in tokenizer.json, its settings beside it."""
    tokenizer = source.load()  # anew: the one that answered probes has set its padding and truncation back
    with tempfile.TemporaryDirectory(prefix="xeco-tokenizer-") as place:
        with quiet():
            tokenizer.save_pretrained(place)
        settings = {
            **read_json(Path(place) / TOKENIZER_CONFIG),
            **{name: getattr(tokenizer, name) for name in _CLASS_SETTINGS},
            "tokenizer_class": _AS_WRITTEN,
        }
        for name in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer
            settings.pop(name, None)
        (Path(place) / TOKENIZER_CONFIG).write_text(_json_text(settings), encoding="utf-8")
        for name in _OLDER_FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.copytree(place, folder, dirs_exist_ok=True)


def _json_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"

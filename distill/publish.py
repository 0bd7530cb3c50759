"""The healed checkpoint: written whole beside the old one, then put in its place; what was there before is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from xeco_convert import __version__
from xeco_convert.checkpoint import CheckpointIndex, CheckpointWriter, TensorReader
from xeco_convert.checkpoint.dtypes import TORCH_DTYPES
from xeco_convert.checkpoint.format import REPORT_FILE
from xeco_convert.checkpoint.index import read_json
from xeco_convert.errors import OptionError, OutputError
from xeco_convert.files import write_text_whole
from xeco_convert.tokenizer import TokenizerFiles, keep_tokenizer

from .card import healing_section, replace_section

_MADE_HERE = ("config.json", REPORT_FILE, "README.md", "model.safetensors.index.json")
_SHARD_BYTES = 5 * 10**9


def write_checkpoint(student: CheckpointIndex, trained: CheckpointIndex, target: Path) -> None:
    """`target`: every tensor of `trained` in the dtype that `student` stores it in; all other files of `student` as they are.

    What transformers saves under another name than `student` has is written under that name, in the most common dtype. Raises
    `CheckpointError` where the tokenizer would not read text as the student's does.
    """
    stored = {name: header.dtype for name, header in student.headers.items()}
    usual = Counter(stored.values()).most_common(1)[0][0]
    names = [*(name for name in stored if name in trained.headers), *sorted(set(trained.headers) - set(stored))]
    headers = [dataclasses.replace(trained.headers[name], dtype=stored.get(name, usual)) for name in names]
    reader = TensorReader(trained)
    with CheckpointWriter(target, headers, max_shard_bytes=_SHARD_BYTES, overwrite=True) as writer:
        for header in headers:
            dtype = TORCH_DTYPES[header.dtype]
            writer.write(header.name, (chunk.to(dtype) for chunk in reader.read_chunks(header.name)))
        for path in sorted(student.folder.rglob("*")):
            relative = path.relative_to(student.folder)
            if path.is_file() and path.suffix != ".safetensors" and str(relative) not in _MADE_HERE:
                writer.copy_file(path, relative)
        for name in (REPORT_FILE, "README.md", "config.json"):
            if (student.folder / name).is_file():
                writer.copy_file(student.folder / name, Path(name))
        keep_tokenizer(TokenizerFiles.of(student), writer.folder)


def record(folder: Path, healing: dict[str, Any]) -> None:
    """Say in a checkpoint's config.json, report and model card how it was healed and how good it is."""
    config = read_json(folder / "config.json")
    conversion = config.get("conversion") or {}
    short = {key: healing[key] for key in ("stages", "teacher", "tokens", "options") if key in healing}
    config["conversion"] = {**conversion, "healing": {"tool": f"xeco-distill {__version__}", **short}}
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
    report["healing"] = healing
    _write(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    update_card(folder, "Healing", healing_section(healing))


def record_evaluation(folder: Path, found: dict[str, Any], section: str) -> None:
    """Put what `xeco-distill eval` found into a checkpoint's report and model card."""
    report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
    report["evaluation"] = found
    _write(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    update_card(folder, "Evaluation", section)


def update_card(folder: Path, title: str, section: str) -> None:
    """Replace one section of README.md, or add it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    _write(card, replace_section(text, title, section))


def _write(file: Path, text: str) -> None:
    try:
        write_text_whole(file, text)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}); free some space, then try again.") from None


def kept_place(out: Path) -> Path:
    """Where the weights before healing go."""
    return out.with_name(f"{out.name}.before-healing")


def check_place(out: Path, output: Path | None, *, overwrite: bool, keep: bool) -> None:
    """Refuse what would lose something, before any work. Raises `OptionError`."""
    if output is not None and output.absolute() != out.absolute():
        if output.is_symlink() or output.is_file():
            raise OptionError(
                f"--output: {output}: expected a folder or nothing, found a file or link; choose another."
            )
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OptionError(
                f"--output: {output} exists already; add --overwrite to replace it, or choose another folder."
            )
        return
    if keep and kept_place(out).exists():
        raise OptionError(
            f"{kept_place(out)} exists already, from a healing before this one; move it away, or add --no-keep-original to "
            "keep no copy of the present weights."
        )


def put_in_place(result: Path, out: Path, output: Path | None, *, keep: bool) -> Path:
    """Rename the whole `result` to its place. At every moment OUT, or its copy, is whole."""
    target = out if output is None else output
    kept = keep and target == out
    aside = kept_place(out) if kept else _replaced_place(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(aside)
        try:
            result.rename(target)
        except BaseException:  # also Ctrl-C between the two
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror}); the healed model is in {result}, nothing was lost."
        ) from None
    if not kept:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def recover(out: Path, result: Path) -> None:
    """Finish, or take back, a replacement that a kill stopped between its two renames."""
    unfinished = (result.parent / "run.json").is_file()
    for aside in (_replaced_place(out), kept_place(out)):
        if unfinished and not out.exists() and aside.is_dir():
            (result if result.is_dir() else aside).rename(out)
    if out.exists():
        shutil.rmtree(_replaced_place(out), ignore_errors=True)


def _replaced_place(target: Path) -> Path:
    """Where something goes that is deleted as soon as its successor stands."""
    return target.with_name(f".{target.name}.replaced")


def save_overlay(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Put tensors by name into a model and save it whole, in its dtype."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

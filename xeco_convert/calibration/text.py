"""Documents to calibrate on: .txt, .jsonl or .parquet files, or a data set by name, through the source's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from xeco_convert.calibration.windows import CalibrationWindows, windows_of_documents
from xeco_convert.errors import CheckpointError
from xeco_convert.tokenizer import load_tokenizer

_MOST_DOCUMENTS = 100_000


def read_windows(calibration: str, folder: Path, *, length: int, num_tokens: int) -> CalibrationWindows:
    """Windows of about `num_tokens` tokens from what --calibration names, tokenized as the checkpoint in `folder` does.

    A .txt file is one document, a .json file holds arrays of token ids. Records of other kinds have a field `text`, or
    `messages` that go through the chat template, or `input_ids`.

    Raises `CheckpointError` for a missing or empty source, records without such a field, too little text.
    """
    tokenizer = _tokenizer_unless_ids(calibration, folder)
    vocabulary, unknown = _vocabulary_size(folder), None if tokenizer is None else _unknown_id(tokenizer)
    special_ids = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids) - {unknown}
    documents: list[list[int]] = []
    found = 0
    for record in islice(read_records(calibration), _MOST_DOCUMENTS):
        documents.append(_known(_tokens(record, tokenizer, calibration), vocabulary, calibration))
        found += len(documents[-1])
        if found >= num_tokens:
            break
    windows = windows_of_documents(
        documents,
        length=max(1, min(length, max((len(document) for document in documents), default=1))),
        num_tokens=num_tokens,
        special_ids=special_ids,
        description=calibration,
    )
    return windows.checked(unknown)


def read_records(calibration: str, flag: str = "--calibration") -> Iterator[Mapping[str, Any]]:
    """Records of a .txt (one), .json, .jsonl or .parquet file, or of a data set by name; `flag` names the option in errors.

    Raises `CheckpointError` for a missing file, lines that are no objects, a data set that cannot be opened.
    """
    path = Path(calibration)
    if path.suffix == ".txt" and path.is_file():
        yield {"text": path.read_text(encoding="utf-8", errors="replace")}
    elif path.suffix == ".json" and path.is_file():
        yield from _token_lists(path, flag)
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _json_lines(path, flag)
    elif path.suffix in (".txt", ".jsonl", ".json", ".parquet") and not path.is_file():
        raise CheckpointError(f"{flag}: {calibration} was not found; give an existing file or a data set's name.")
    else:
        yield from _data_set(calibration, path, flag)


def _token_lists(path: Path, flag: str) -> Iterator[Mapping[str, Any]]:
    """Sequences of token ids, as a JSON array of arrays: text that is tokenized already."""
    try:
        lists = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError:
        lists = None
    if not isinstance(lists, list) or not all(isinstance(item, list) for item in lists):
        raise CheckpointError(f"{flag}: {path}: expected a JSON array of arrays of token ids, found something else.")
    for item in lists:
        yield {"input_ids": item}


def _json_lines(path: Path, flag: str) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise CheckpointError(f"{flag}: {path}, line {number}: expected a JSON object, found something else.")
            yield record


def _data_set(calibration: str, path: Path, flag: str) -> Iterable[Mapping[str, Any]]:
    """Records of a parquet file or a named data set (name, name:split), streamed by the datasets library."""
    try:
        import datasets
    except ImportError:
        raise CheckpointError(
            f"{flag}: {calibration} needs the datasets library: pip install 'xeco-convert[data]', or give .txt or .jsonl."
        ) from None
    try:
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)  # type: ignore[no-any-return]
        name, _, split = calibration.partition(":")
        return datasets.load_dataset(name, split=split or "train", streaming=True)  # type: ignore[no-any-return]
    except Exception as error:  # the library passes on errors of many libraries below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{flag}: {calibration} could not be opened ({reason}).") from None


def _tokens(record: Mapping[str, Any], tokenizer: Any, calibration: str) -> list[int]:
    if isinstance(record.get("input_ids"), list):
        return list(record["input_ids"])
    if isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise CheckpointError(
                f"--calibration: {calibration} holds chats, and the source has no chat template; give text."
            )
        try:
            encoded = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=True)
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"--calibration: {calibration}: messages do not go through the source's chat template ({reason}); "
                "give text, or a list of objects with role and content."
            ) from None
        return list(encoded["input_ids"])
    text = record.get("text")
    if not isinstance(text, str):
        raise CheckpointError(
            f"--calibration: {calibration}: expected records with a field text, messages or input_ids, found {sorted(record)}."
        )
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenizer_unless_ids(calibration: str, folder: Path) -> Any:
    """The tokenizer; None where it cannot be had and token ids need none: a source may come without."""
    try:
        return load_tokenizer(folder)
    except CheckpointError:
        if Path(calibration).suffix != ".json":
            raise
        return None


def _unknown_id(tokenizer: Any) -> int | None:
    """The token of what the tokenizer does not know: as declared, or else as its model uses it (many configurations are
    silent about it); None where it knows everything."""
    if tokenizer.unk_token_id is not None or not tokenizer.is_fast:
        found: int | None = tokenizer.unk_token_id
        return found
    unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    return tokenizer.backend_tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None


def _vocabulary_size(folder: Path) -> int | None:
    size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    return size if isinstance(size, int) else None


def _known(tokens: list[Any], vocabulary: int | None, calibration: str) -> list[int]:
    """The tokens, if all of them are ids of the vocabulary."""
    for token in tokens:
        if type(token) is not int or token < 0 or (vocabulary is not None and token >= vocabulary):
            limit = "" if vocabulary is None else f" below {vocabulary}"
            raise CheckpointError(
                f"--calibration: {calibration}: expected token ids{limit} of the source's vocabulary, found {token!r}; "
                "tokenize the text with the source's own tokenizer."
            )
    return tokens

"""Windows to calibrate on, from text files or a data set, through the source's tokenizer."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from xeco_convert.calibration.files import read_records
from xeco_convert.calibration.records import Encoder
from xeco_convert.calibration.windows import CalibrationWindows, windows_of_documents
from xeco_convert.errors import CheckpointError
from xeco_convert.tokenizer import load_tokenizer

_MOST_DOCUMENTS = 100_000
_CHOSEN_FROM = 32  # times as many tokens as are asked for are read, where there are so many


def read_windows(calibration: str, folder: Path, *, length: int, num_tokens: int) -> CalibrationWindows:
    """Windows of about `num_tokens` tokens from what --calibration names, tokenized as the checkpoint in `folder` does.

    A file of running text is one document, without special tokens, and so is the text of a record. The windows are evenly spread
    over the text, of records over the first 32 times as many tokens.

    Raises `CheckpointError` as `read_records` and `Encoder` do, and for too little text.
    """
    tokenizer = _tokenizer_unless_ids(calibration, folder)
    unknown = None if tokenizer is None else _unknown_id(tokenizer)
    special_ids = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids) - {unknown}
    encoder = Encoder(tokenizer=tokenizer, name=calibration, flag="--calibration", vocabulary=_vocabulary_size(folder))
    documents: list[list[int]] = []
    count = 0
    for record in islice(read_records(calibration), _MOST_DOCUMENTS):
        documents.append(list(encoder.encode(record).ids))
        count += len(documents[-1])
        if count >= _CHOSEN_FROM * num_tokens:
            break
    windows = windows_of_documents(
        documents,
        length=max(1, min(length, max((len(document) for document in documents), default=1))),
        num_tokens=num_tokens,
        special_ids=special_ids,
        description=calibration,
    )
    return windows.checked(unknown)


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

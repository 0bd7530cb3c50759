"""Documents to learn from: text, chats, or prompts with completions, through the student's tokenizer.

Files and data sets, and what a record means, are those of calibration (xeco_convert.calibration).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xeco_convert.calibration.files import is_running_text, read_records
from xeco_convert.calibration.records import Document, Encoder
from xeco_convert.errors import CheckpointError

from ..errors import DataError


def read_documents(
    data: str, tokenizer: Any, *, assistant_only: bool = False, vocabulary: int | None = None
) -> Iterator[Document]:
    """Documents of a file or data set, those with nothing to learn left out.

    A file of running text gets no special tokens. Raises `DataError` as `read_records` and `Encoder` raise `CheckpointError`,
    and where nothing is left.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        name=data,
        flag="--data",
        vocabulary=vocabulary,
        marks=not is_running_text(data),
        assistant_only=assistant_only,
    )
    seen = used = 0
    try:
        for record in read_records(data, "--data"):
            seen += 1
            document = encoder.encode(record)
            if len(document.ids) > 1 and any(document.learned[1:]):
                used += 1
                yield document
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if used == 0:
        raise DataError(
            f"--data: {data}: nothing to learn from in {seen} records: all are shorter than two tokens"
            f"{', or without an assistant turn or completion' if assistant_only else ''}; give other data."
        )

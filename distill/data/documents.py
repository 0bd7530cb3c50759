"""Documents to learn from: text, chats, or prompts with completions, through the student's tokenizer.

Files and data sets are read by xeco_convert.calibration.text; this file knows what a record means for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.calibration.text import read_records
from xeco_convert.errors import CheckpointError

from ..errors import DataError

FIELDS = "text, messages, or prompt and completion"


@dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids, and which of them are to be learned, that is predicted from what is before them."""

    ids: Sequence[int]
    learned: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Records -> documents. `assistant_only`: of chats and completions, only the answers are learned."""

    tokenizer: Any
    name: str
    assistant_only: bool = False
    flag: str = "--data"

    def encode(self, record: Mapping[str, Any]) -> Document:
        """Raises `DataError` for a record without usable fields, and for chats that the template does not take."""
        if isinstance(record.get("input_ids"), list):
            return _whole(list(record["input_ids"]))
        if isinstance(record.get("messages"), list):
            return self._chat(record["messages"])
        prompt, completion = record.get("prompt"), record.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion])
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._completion(prompt, completion)
        text = record.get("text")
        if isinstance(text, str):
            return _whole(self._ended(self._tokens(text)))
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(record.items())) or "no fields"
        raise DataError(
            f"{self.flag}: {self.name}: expected records with {FIELDS}, found {found}; rename the field that holds the text."
        )

    def _tokens(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, verbose=False, **options)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        """With the token that ends a text, where the tokenizer has one and did not add it."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _completion(self, prompt: str, completion: str) -> Document:
        before = self._tokens(prompt)
        ids = self._ended([*before, *self._tokens(completion, add_special_tokens=False)])
        learned = [not self.assistant_only or place >= len(before) for place in range(len(ids))]
        return Document(ids=ids, learned=learned)

    def _chat(self, messages: list[Any]) -> Document:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.flag}: {self.name} holds chats, and the model has no chat template; give text, or add a "
                "chat_template to the tokenizer."
            )
        ids = self._template(messages)
        if not self.assistant_only:
            return _whole(ids)
        return Document(ids=ids, learned=self._assistant_turns(messages, ids))

    def _assistant_turns(self, messages: list[Any], ids: list[int]) -> list[bool]:
        """Which tokens an assistant's turn adds: the chat up to it, with what invites its answer, against the chat with it.

        Templates with {% generation %} could tell themselves, but few have it.
        """
        learned = [False] * len(ids)
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._template(messages[:number], add_generation_prompt=True)
            after = self._template(messages[: number + 1])
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise DataError(
                    f"{self.flag}: {self.name}: the chat template writes turns differently once others follow, so that "
                    "assistant turns cannot be told apart; leave --assistant-only out."
                )
            learned[len(before) : len(after)] = [True] * (len(after) - len(before))
        return learned

    def _template(self, messages: list[Any], **options: Any) -> list[int]:
        try:
            encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{self.flag}: {self.name}: messages do not go through the model's chat template ({reason}); expected a "
                "list of objects with role and content."
            ) from None
        return list(encoded["input_ids"])


def read_documents(
    data: str, tokenizer: Any, *, assistant_only: bool = False, vocabulary: int | None = None
) -> Iterator[Document]:
    """Documents of a file or data set, those with nothing to learn left out.

    A .txt file is one running text and gets no special tokens. Raises `DataError` as `Encoder` does, for ids outside the
    vocabulary, and where nothing is left.
    """
    encoder = Encoder(tokenizer=tokenizer, name=data, assistant_only=assistant_only)
    running_text = Path(data).suffix == ".txt"
    seen = kept = 0
    try:
        for record in read_records(data, "--data"):
            seen += 1
            if running_text:
                document = _whole(encoder._tokens(str(record["text"]), add_special_tokens=False))
            else:
                document = encoder.encode(record)
            _check_ids(document, vocabulary, data)
            if len(document.ids) > 1 and any(document.learned[1:]):
                kept += 1
                yield document
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if kept == 0:
        raise DataError(
            f"--data: {data}: nothing to learn from in {seen} records: all are shorter than two tokens"
            f"{', or without an assistant turn or completion' if assistant_only else ''}; give other data."
        )


def _whole(ids: list[int]) -> Document:
    return Document(ids=ids, learned=[True] * len(ids))


def _check_ids(document: Document, vocabulary: int | None, data: str) -> None:
    for token in document.ids:
        if type(token) is not int or token < 0 or (vocabulary is not None and token >= vocabulary):
            raise DataError(
                f"--data: {data}: expected token ids below {vocabulary}, found {token!r}; tokenize with the model's own "
                "tokenizer."
            )

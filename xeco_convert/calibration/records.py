"""What a record means in tokens: the same for calibration and for healing, so that both see what the model will see."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xeco_convert.errors import CheckpointError
from xeco_convert.tokenizer.loading import tokenizer_errors

FIELDS = "text, messages, or prompt and completion"
# ShareGPT's names of who speaks
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MOST_IDS = 2**31  # of a vocabulary whose size nothing says


@dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids, and which of them are to be learned, that is predicted from what is before them."""

    ids: Sequence[int]
    learned: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Records -> documents; `name` and `flag` say in errors where they come from. `vocabulary`: ids must be below.

    `marks`: whether text begins and ends with the tokenizer's special tokens, as training has it; chats have those of their
    template. `assistant_only`: of chats and completions, only the answers are learned. `tokenizer` None: token ids alone.
    """

    tokenizer: Any
    name: str
    flag: str
    vocabulary: int | None = None
    marks: bool = False
    assistant_only: bool = False

    def encode(self, record: Mapping[str, Any]) -> Document:
        """input_ids as they are, a chat (messages, or conversations as ShareGPT writes them) through the template with its
        tools and other variables, a prompt with its completion, or text.

        Raises `CheckpointError` for a record without usable fields, for chats that the template does not take, for ids beyond
        the vocabulary.
        """
        document = self._document(record)
        for token in document.ids:
            if type(token) is not int or not 0 <= token < (self.vocabulary or _MOST_IDS):
                below = "" if self.vocabulary is None else f" below {self.vocabulary}"
                raise self._refused(
                    f"expected token ids{below}, found {token!r:.40}; tokenize with the model's own tokenizer."
                )
        return document

    def _document(self, record: Mapping[str, Any]) -> Document:
        if isinstance(record.get("input_ids"), list):
            return _whole(list(record["input_ids"]))
        if self.tokenizer is None:
            raise self._refused(
                "holds text, and no tokenizer of the model could be loaded; give token ids.", separator=""
            )
        for field in ("messages", "conversations"):
            if isinstance(record.get(field), list):
                return self._chat(record[field], record)
        prompt, completion = record.get("prompt"), record.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion], record)
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._completion(prompt, completion)
        if isinstance(record.get("text"), str):
            return _whole(self._ended(self._tokens(record["text"], add_special_tokens=self.marks)))
        raise self._refused(
            f"expected records with {FIELDS}, found {fields_in_words(record)}; rename the field that holds the text."
        )

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with tokenizer_errors(self._not_read):
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        """With the token that ends a text, where the tokenizer has one and did not add it."""
        end = self.tokenizer.eos_token_id
        return ids if not self.marks or end is None or (ids and ids[-1] == end) else [*ids, end]

    def _completion(self, prompt: str, completion: str) -> Document:
        before = self._tokens(prompt, add_special_tokens=self.marks)
        ids = self._ended([*before, *self._tokens(completion, add_special_tokens=False)])
        learned = [not self.assistant_only or position >= len(before) for position in range(len(ids))]
        return Document(ids=ids, learned=learned)

    def _chat(self, messages: list[Any], record: Mapping[str, Any]) -> Document:
        if not self.tokenizer.chat_template:
            raise self._refused(
                "holds chats, and the model has no chat template; give text, or add a chat_template to the tokenizer.",
                separator="",
            )
        try:
            chat, variables = checked_messages(messages), template_variables(record, self.tokenizer)
        except ValueError as error:
            raise self._not_taken(str(error)) from None
        ids = self._template(chat, variables)
        if not self.assistant_only:
            return _whole(ids)
        return Document(ids=ids, learned=self._assistant_turns(chat, variables, ids))

    def _assistant_turns(self, chat: list[dict[str, Any]], variables: dict[str, Any], ids: list[int]) -> list[bool]:
        """Which tokens an assistant's turn adds: the chat up to it, with what invites its answer, against the chat with it.

        Templates with {% generation %} could tell themselves, but few have it.
        """
        learned = [False] * len(ids)
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise self._refused(
                    "a chat begins with the assistant's turn, before which nothing asks for it; leave it out."
                )
            before = self._template(chat[:number], {**variables, "add_generation_prompt": True})
            after = self._template(chat[: number + 1], variables)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise self._refused(
                    "the chat template writes turns differently once others follow, so that assistant turns cannot be told "
                    "apart; leave --assistant-only out."
                )
            learned[len(before) : len(after)] = [True] * (len(after) - len(before))
        return learned

    def _template(self, chat: list[dict[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        with tokenizer_errors(self._not_taken):
            encoded = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **variables)
            return list(encoded["input_ids"])

    def _not_read(self, reason: str) -> CheckpointError:
        return self._refused(f"the model's tokenizer does not take this text ({reason}); check the tokenizer's files.")

    def _not_taken(self, reason: str) -> CheckpointError:
        return self._refused(
            f"messages do not go through the model's chat template ({reason}); expected a list of objects with role and "
            "content."
        )

    def _refused(self, sentence: str, separator: str = ":") -> CheckpointError:
        return CheckpointError(f"{self.flag}: {self.name}{separator} {sentence}")


def checked_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """The messages as templates take them: role and content by these names, content as text, nothing that is null (as
    transformers leaves it out). Raises `ValueError` with the reason."""
    if not messages:
        raise ValueError("the list is empty")
    return [_checked_message(message, number) for number, message in enumerate(messages, start=1)]


def _checked_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {message!r:.40}")
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        speaker = given.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise ValueError(f"message {number} is from {speaker!r:.40}, known are {', '.join(_SPEAKERS)}")
        given = {"role": _SPEAKERS[speaker], "content": given.pop("value", None), **given}
    if not isinstance(given.get("role"), str):
        raise ValueError(f"message {number} has no role")
    if set(given) == {"role"} or ("content" in given and not isinstance(given["content"], (str, list))):
        raise ValueError(f"message {number} has no text as its content")
    if isinstance(given.get("content"), list):
        given["content"] = _joined(given["content"], number)
    return given


def _joined(parts: list[Any], number: int) -> str:
    """The text of a content in parts: what a template of a text model would write out as it stands in Python."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {number} has parts that are no text")
    return "".join(map(str, texts))


def template_variables(record: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """What a record gives its chat's template beside the messages: tools, documents (lists of objects, or such lists as
    JSON), and chat_template_kwargs. Raises `ValueError` with the reason."""
    variables: dict[str, Any] = {}
    for name in ("tools", "documents"):
        found = _from_json(record.get(name), name)
        if not found and not isinstance(found, (int, float)):
            continue
        if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
            raise ValueError(f"{name} are {found!r:.40}, expected a list of objects")
        variables[name] = found
    given = _from_json(record.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs are {given!r:.40}, expected an object")
    reserved = {"self", *inspect.signature(tokenizer.apply_chat_template).parameters} & set(given)
    if reserved:
        raise ValueError(f"chat_template_kwargs hold {min(reserved)}, which is no variable of a template")
    return {**variables, **given}


def _from_json(value: Any, name: str) -> Any:
    """The value that a text holds, as data sets store lists whose items differ."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise ValueError(f"{name} are a text that is no JSON") from None


def fields_in_words(record: Mapping[str, Any]) -> str:
    """Names and kinds of a record's fields."""
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(record.items())) or "no fields"


def _whole(ids: list[int]) -> Document:
    return Document(ids=ids, learned=[True] * len(ids))

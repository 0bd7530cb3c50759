"""Whether two tokenizers read and write alike: texts that tell their rules apart, through both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from xeco_convert.tokenizer.loading import quiet

# Each text is one that some rule of splitting, normalising or joining treats in its own way.
_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\t",
    "a",
    " a",
    "a ",
    "  a  b   c    ",
    "\n a\r\n\tb \n\n  c",
    "The quick brown fox didn't jump; it's WE'LL-known, isn't it?!",
    "HTMLParser camelCase snake_case kebab-case",
    "0 7 42 123 1234 12345 123456789 3.14159 1,000,000 1e-5 0x1F ½ ²",
    "a1b22c333 v1.2.3-rc4 2026-11-26T01:15:44Z",
    "Ünïcödé café café naïve Straße Ærø Œuvre İstanbul",
    "Ελληνικά Русский текст עברית",
    "中文文本没有空格。日本語のテキスト、カタカナ。한국어 텍스트",
    "العربية مَرْحَبًا ١٢٣",
    "हिन्दी क्षत्रिय १२३",
    "ภาษาไทยไม่มีช่องว่าง",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇩🇪",
    "ﬁ ① Ａ　full　width \u00a0nbsp\u200bzero\u00adsoft ▁ Ġ",
    "\ufeffbom \ufffd \x00\x07",
    "def f(self):\n    return x[12345]  # ==> {'a': \"b\\n\"}\n\n\n\tif a!=b&&c||d: i++;",
    "https://a.b/c?d=e#g user@c.de",
    "<s> </s> <unk> <pad> <|endoftext|> [INST] x [/INST] <bos><eos>",
    "((((----____====....!!!!????",
    "....\n....\n",
)
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": " Hi, 12345! "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Thanks.\n"},
    ],
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Its name."}}},
        },
    }
]
_SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
    "special_tokens_map",
    "all_special_ids",
    "clean_up_tokenization_spaces",
    "chat_template",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A probe that two tokenizers answer differently: what it is, and both answers in words."""

    probe: str
    actual: str
    expected: str

    def __str__(self) -> str:
        return f"{self.probe} {self.actual}, expected {self.expected}"


def first_difference(reference: Any, other: Any, *, settings: bool = True) -> Difference | None:
    """The first probe that `other` answers differently from `reference`; None where they are alike.

    Compares the vocabulary, ids of texts and of every added token, with and without special tokens, and decoding; with
    `settings` also special tokens, sides, limits and chat templates, in which tokenizers of one vocabulary may differ.
    """
    difference = _vocabulary_difference(reference.get_vocab(), other.get_vocab())
    if difference is not None:
        return difference
    added = _added_tokens(reference)
    with quiet():
        for (name, expected), (_, actual) in zip(
            _answers(reference, added, settings), _answers(other, added, settings), strict=True
        ):
            if expected != actual:
                return Difference(
                    probe=f"{name} gives", actual=_short(actual, expected), expected=_short(expected, actual)
                )
    return None


def _added_tokens(tokenizer: Any) -> list[str]:
    """Every token that is found in a text before its rules are applied."""
    try:
        return sorted(tokenizer.get_added_vocab())
    except AttributeError:  # mistral-common's: only its special tokens are known
        return sorted(tokenizer.all_special_tokens)


def _vocabulary_difference(expected: dict[str, int], actual: dict[str, int]) -> Difference | None:
    """The first id of another token; tokens that share an id are told by their own."""
    if expected == actual:
        return None
    by_id = [{number: token for token, number in vocabulary.items()} for vocabulary in (expected, actual)]
    for number in sorted(set(by_id[0]) | set(by_id[1])):
        words = ["no token" if token is None else repr(token) for token in (by_id[0].get(number), by_id[1].get(number))]
        if words[0] != words[1]:
            return Difference(probe=f"id {number} is", actual=words[1], expected=words[0])
    token = next(name for name in sorted(set(expected) | set(actual)) if expected.get(name) != actual.get(name))
    return Difference(probe=f"token {token!r} has id", actual=str(actual.get(token)), expected=str(expected.get(token)))


def _answers(tokenizer: Any, added: list[str], settings: bool) -> Iterator[tuple[str, Any]]:
    """Every probe by name, and what the tokenizer says to it."""
    inside = [f"word{token}word {token} 12 {token}" for token in added]
    for text in (*_TEXTS, *added, *inside):
        for special in (False, True):
            ids = _tried(_ids, tokenizer, text, special)
            name = f"the text {text!r}{' with special tokens' if special else ''}"
            yield name, ids
            if special:
                yield f"{name}, decoded,", _tried(_decoded, tokenizer, ids, False)
                yield f"{name}, decoded without them,", _tried(_decoded, tokenizer, ids, True)
    if settings:
        yield from _setting_answers(tokenizer)


def _setting_answers(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    for name in _SETTINGS:
        yield name, _tried(getattr, tokenizer, name)
    yield "a pair of texts", _tried(_pair, tokenizer)
    for chat in _CHATS:
        for tools in (None, _TOOLS):
            for prompt in (False, True):
                how = f"a chat of {len(chat)} messages{' with tools' if tools else ''}, add_generation_prompt={prompt},"
                yield how, _tried(_chat_ids, tokenizer, chat, tools, prompt)


def _tried(ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or the kind of error: templates and decoders may refuse, and then both have to."""
    try:
        return ask(*arguments)
    except Exception as error:
        return type(error).__name__


def _pair(tokenizer: Any) -> dict[str, Any]:
    return dict(tokenizer("a b", "c d"))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _decoded(tokenizer: Any, ids: Any, skip_special_tokens: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def _chat_ids(tokenizer: Any, chat: list[dict[str, str]], tools: Any, prompt: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _short(value: Any, other: Any) -> str:
    """A value in few words: of long lists the part where they begin to differ."""
    if not isinstance(value, list) or not isinstance(other, list) or len(value) <= 12:
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:200]}..."
    first = next((position for position, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), len(other))
    start = max(0, first - 2)
    return f"{len(value)} ids, from the {start + 1}th on {value[start : start + 6]}"

"""What a record means: the same tokens for calibration and healing, chats with all that their template asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import bytes_alone
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from xeco_convert.calibration.records import Encoder
from xeco_convert.calibration.text import read_windows
from xeco_convert.errors import CheckpointError
from xeco_distill.data import read_documents

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}{% if documents %}({{ documents | tojson }}){% endif %}"
    "{% if mood is defined %}{{ mood }};{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}!{{ m.tool_calls | tojson }}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
TOOLS = [{"name": "clock", "parameters": {"zone": {"type": "string"}}}]
PLAIN = "<s><user>hello</s><assistant>good day</s>"


@pytest.fixture
def tokenizer() -> Any:
    """Bytes, <s> (256) that begins a text and </s> (257) that ends."""
    model = bytes_alone("<s>", "</s>")
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    found = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    return Encoder(tokenizer=tokenizer, name="a.jsonl", flag="--data", **options)


def text_of(tokenizer: Any, record: dict[str, Any], **options: Any) -> str:
    ids = encoder(tokenizer, **options).encode(record).ids
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": CHAT}, PLAIN),
    "a chat in two": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PLAIN),
    "messages before text": ({"messages": CHAT, "text": "other", "prompt": "other"}, PLAIN),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]},
        PLAIN,
    ),
    "conversations with roles": ({"conversations": CHAT}, PLAIN),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
                CHAT[1],
            ]
        },
        PLAIN,
    ),
    "nothing for the template": ({"messages": CHAT, "tools": [], "documents": None, "chat_template_kwargs": {}}, PLAIN),
    "nothing as text": ({"messages": CHAT, "tools": "", "documents": "null", "chat_template_kwargs": "{}"}, PLAIN),
    "fields that are null": ({"messages": [{**CHAT[0], "tool_calls": None}, {**CHAT[1], "name": None}]}, PLAIN),
    "tools": ({"messages": CHAT, "tools": TOOLS}, PLAIN.replace("<s>", f"<s>[{json.dumps(TOOLS)}]")),
    "tools as text": (
        {"messages": CHAT, "tools": json.dumps(TOOLS)},
        PLAIN.replace("<s>", f"<s>[{json.dumps(TOOLS)}]"),
    ),
    "tools of sharegpt": ({"conversations": CHAT, "tools": TOOLS}, PLAIN.replace("<s>", f"<s>[{json.dumps(TOOLS)}]")),
    "documents": ({"messages": CHAT, "documents": [{"title": "a"}]}, PLAIN.replace("<s>", '<s>([{"title": "a"}])')),
    "further variables": ({"messages": CHAT, "chat_template_kwargs": {"mood": "gay"}}, PLAIN.replace("<s>", "<s>gay;")),
    "a call without content": (
        {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
        '<s><user>hello</s><assistant>![{"id": 1}]</s>',
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_chat_reaches_its_template_with_all_that_belongs_to_it(case: str, tokenizer: Any) -> None:
    record, expected = CHATS[case]
    assert text_of(tokenizer, record) == text_of(tokenizer, record, marks=True) == expected


@pytest.mark.parametrize("case", CHATS)
def test_of_every_chat_the_answers_alone_can_be_learned(case: str, tokenizer: Any) -> None:
    """Also where tools stand before them."""
    record, expected = CHATS[case]
    document = encoder(tokenizer, assistant_only=True).encode(record)
    learned = [token for token, wanted in zip(document.ids, document.learned, strict=True) if wanted]
    assert tokenizer.decode(document.ids) == expected
    assert tokenizer.decode(learned) == expected.rpartition("<assistant>")[2]


def test_text_has_marks_for_healing_and_none_for_calibration(tokenizer: Any) -> None:
    records = {"text": {"text": "a story"}, "both": {"prompt": "a ", "completion": "story"}}
    for record in records.values():
        assert text_of(tokenizer, record) == "a story"
        assert text_of(tokenizer, record, marks=True) == "<s>a story</s>"
    assert list(encoder(tokenizer, marks=True).encode({"input_ids": [5, 6]}).ids) == [5, 6]


def test_calibration_and_healing_read_the_same_file_alike(tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    """Through both readers, from one file: chats have the same tokens, a plain text has the same but for its marks."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 258}')
    records = [{"messages": CHAT, "tools": TOOLS}, {"text": "a story"}, {"prompt": "a ", "completion": "story"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) * 20)
    healing = [list(document.ids) for document in read_documents(str(file), tokenizer)]
    windows = read_windows(str(file), tmp_path / "model", length=200, num_tokens=10_000)
    calibration = [row[: len(healing[number])].tolist() for number, row in enumerate(windows.ids)]
    assert (
        calibration[0] == healing[0]
        and calibration[1][:7] == calibration[2][:7] == healing[1][1:-1] == healing[2][1:-1]
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "expected records with text, messages, or prompt and completion, found no fields"),
    "a number for text": ({"text": 5}, r"found text \(int\); rename the field that holds the text"),
    "an object for messages": ({"messages": {}}, r"found messages \(dict\)"),
    "no messages": ({"messages": []}, r"do not go through .* \(the list is empty\)"),
    "text for a message": (
        {"messages": ["hello"]},
        r"\(message 1 is 'hello'\); expected a list of objects with role and",
    ),
    "no role": ({"messages": [CHAT[0], {"content": "x"}]}, r"\(message 2 has no role\)"),
    "a number for a role": ({"messages": [{"role": 3, "content": "x"}]}, r"\(message 1 has no role\)"),
    "no content": ({"messages": [{"role": "user"}]}, r"\(message 1 has no text as its content\)"),
    "null for content": (
        {"messages": [{"role": "user", "content": None}]},
        r"\(message 1 has no text as its content\)",
    ),
    "a number for content": (
        {"messages": [{"role": "user", "content": 5}]},
        r"\(message 1 has no text as its content\)",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 has parts that are no text",
    ),
    "nothing in a part": ({"messages": [{"role": "user", "content": [None]}]}, "message 1 has parts that are no text"),
    "a stranger": (
        {"conversations": [{"from": "observation", "value": "x"}]},
        "message 1 is from 'observation', known are",
    ),
    "a list for a stranger": ({"conversations": [{"from": [], "value": "x"}]}, r"message 1 is from \[\], known are"),
    "a number for tools": ({"messages": CHAT, "tools": 5}, "tools are 5, expected a list of objects"),
    "words for tools": ({"messages": CHAT, "tools": "clock"}, "tools are a text that is no JSON"),
    "an object for tools": (
        {"messages": CHAT, "tools": {"name": "clock"}},
        "tools are {.*}, expected a list of objects",
    ),
    "null among documents": (
        {"messages": CHAT, "documents": [None]},
        r"documents are \[None\], expected a list of objects",
    ),
    "a list of variables": (
        {"messages": CHAT, "chat_template_kwargs": [1]},
        r"chat_template_kwargs are \[1\], expected an",
    ),
    "no variable": (
        {"messages": CHAT, "chat_template_kwargs": {"tokenize": False}},
        "hold tokenize, which is no variable",
    ),
    "half an emoji inside": (
        {"messages": CHAT, "tools": '[{"name": "\\ud83d"}]'},
        "do not go through|does not take this text",
    ),
    "half an emoji": ({"text": "\ud83d"}, "the model's tokenizer does not take this text"),
    "a word for an id": (
        {"input_ids": [1, "a"]},
        "expected token ids below 258, found 'a'; tokenize with the model's own",
    ),
    "an id beyond": ({"input_ids": [258]}, "expected token ids below 258, found 258"),
    "a negative id": ({"input_ids": [-1]}, "expected token ids below 258, found -1"),
    "a truth value for an id": ({"input_ids": [True]}, "expected token ids below 258, found True"),
    "no number": ({"input_ids": [float("nan")]}, "expected token ids below 258, found nan"),
}


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_told(case: str, assistant_only: bool, tokenizer: Any) -> None:
    record, sentence = BAD[case]
    with pytest.raises(CheckpointError, match=sentence) as refused:
        encoder(tokenizer, vocabulary=258, assistant_only=assistant_only).encode(record)
    assert str(refused.value).startswith("--data: a.jsonl") and "\n" not in str(refused.value)


def test_ids_are_bounded_where_nothing_says_how_many_there_are(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="expected token ids, found 1000"):
        encoder(tokenizer).encode({"input_ids": [10**30]})


def test_a_chat_that_begins_with_the_answer_has_nothing_to_tell_it_by(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="begins with the assistant's turn"):
        encoder(tokenizer, assistant_only=True).encode({"messages": CHAT[1:]})
    assert encoder(tokenizer).encode({"messages": CHAT[1:]}).ids

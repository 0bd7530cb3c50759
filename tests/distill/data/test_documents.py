"""Records of every kind become documents with what is to be learned of them; what cannot is refused with what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import bytes_alone
from transformers import PreTrainedTokenizerFast

from xeco_distill.data import Document, read_documents
from xeco_distill.errors import DataError
from xeco_distill.stages.preference import read_preferences

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "me"},
]


@pytest.fixture
def tokenizer() -> Any:
    """Bytes, and </s> (256) that ends."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone(), eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(folder: Path, *records: Any) -> str:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def learned_text(tokenizer: Any, document: Document) -> str:
    ids = [token for token, learned in zip(document.ids, document.learned, strict=True) if learned]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).replace(" ", "")


def read(name: str, tokenizer: Any, **options: Any) -> list[Document]:
    return list(read_documents(name, tokenizer, **options))


def test_text_is_learned_whole_and_ends(tmp_path: Path, tokenizer: Any) -> None:
    (document,) = read(jsonl(tmp_path, {"text": "a small story."}), tokenizer)
    assert all(document.learned) and document.ids[-1] == tokenizer.eos_token_id


def test_a_txt_file_is_one_running_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a small story.\n\nanother one.", encoding="utf-8")
    (document,) = read(str(file), tokenizer)
    assert tokenizer.eos_token_id not in document.ids


@pytest.mark.parametrize("assistant_only", [False, True])
def test_chats_go_through_the_template(tmp_path: Path, tokenizer: Any, assistant_only: bool) -> None:
    (document,) = read(jsonl(tmp_path, {"messages": CHAT}), tokenizer, assistant_only=assistant_only)
    text = learned_text(tokenizer, document)
    if assistant_only:
        assert "goodday" in text and "me" in text and "hello" not in text and "who" not in text
    else:
        assert "hello" in text and all(document.learned)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_completions_are_told_from_prompts(tmp_path: Path, tokenizer: Any, assistant_only: bool) -> None:
    record = {"prompt": "the cat sat on", "completion": " the mat"}
    (document,) = read(jsonl(tmp_path, record), tokenizer, assistant_only=assistant_only)
    text = learned_text(tokenizer, document)
    assert ("mat" in text) and (("cat" in text) is not assistant_only)
    assert document.ids[-1] == tokenizer.eos_token_id


def test_conversational_prompt_and_completion_are_a_chat(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    (document,) = read(jsonl(tmp_path, record), tokenizer, assistant_only=True)
    assert "goodday" in learned_text(tokenizer, document)


def test_parquet_files_are_read(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import Dataset

    file = tmp_path / "data.parquet"
    Dataset.from_list([{"text": "one story."}, {"text": "two stories."}]).to_parquet(str(file))
    assert len(read(str(file), tokenizer)) == 2


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"content": "x", "id": 3}],
            r"expected records with text, messages, or prompt and completion, found content \(str\), id \(int\)",
        ),
        ([{}], "found no fields"),
        ([{"text": None}], r"found text \(NoneType\)"),
        ([{"messages": ["hello"]}], "do not go through the model's chat template"),
        ([{"text": ""}], "nothing to learn from in 1 records"),
        ([], "nothing to learn from in 0 records"),
        ([{"input_ids": [1, 999]}], "expected token ids below 277, found 999"),
        ([{"input_ids": [1, "a"]}], "expected token ids below 277, found 'a'"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path: Path, tokenizer: Any, records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path, *records), tokenizer, vocabulary=277)


def test_broken_lines_missing_files_and_unknown_sets_are_named(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\nnot json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"--data: .*bad.jsonl, line 2: expected a JSON object"):
        read(str(file), tokenizer)
    with pytest.raises(DataError, match=r"--data: .*gone.jsonl was not found"):
        read(str(tmp_path / "gone.jsonl"), tokenizer)
    with pytest.raises(DataError, match="--data: nobody/nothing could not be opened"):
        read("nobody/nothing", tokenizer)


def test_without_a_chat_template_chats_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        read(jsonl(tmp_path, {"messages": CHAT}), tokenizer)


def test_a_template_that_rewrites_earlier_turns_cannot_tell_them_apart(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match="leave --assistant-only out"):
        read(jsonl(tmp_path, {"messages": CHAT}), tokenizer, assistant_only=True)


def test_without_an_assistant_turn_nothing_is_left(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="without an assistant turn or completion"):
        read(jsonl(tmp_path, {"messages": CHAT[:1]}), tokenizer, assistant_only=True)


def test_preferences_are_checked(tmp_path: Path, tokenizer: Any) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert read_preferences(jsonl(tmp_path, good, good), tokenizer) == [good, good]
    chats = {"prompt": "hello", "chosen": CHAT[:2], "rejected": [CHAT[0], CHAT[3]]}
    (found, _) = read_preferences(jsonl(tmp_path, chats, chats), tokenizer)
    assert found == {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": CHAT[3:4]}
    for bad in ({"prompt": "p", "chosen": "c"}, {**good, "rejected": ""}, {**good, "rejected": ["r"]}):
        with pytest.raises(DataError, match="expected records with prompt, chosen, rejected"):
            read_preferences(jsonl(tmp_path, good, bad), tokenizer)
    with pytest.raises(DataError, match="holds 1 records, expected at least 2"):
        read_preferences(jsonl(tmp_path, good), tokenizer)

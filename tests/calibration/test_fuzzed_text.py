"""Whatever stands in a text file or a tokenizer's files: a result, or one sentence. Never another error."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from xeco_convert.calibration.records import Encoder
from xeco_convert.calibration.text import load_tokenizer, read_windows
from xeco_convert.errors import XecoError
from xeco_distill.data import read_documents
from xeco_distill.stages.preference import read_preferences

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
CHAT = [{"role": "user", "content": "w5 w6 "}, {"role": "assistant", "content": "w7"}]
RECORDS = [
    {"text": "w5 w6 w7"},
    {"messages": CHAT, "tools": [{"name": "w5"}], "documents": [], "chat_template_kwargs": {"mood": 1}},
    {"conversations": [{"from": "human", "value": "w5 "}, {"from": "gpt", "value": "w6"}], "tools": "[]"},
    {"prompt": "w5", "completion": "w6"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"input_ids": [5, 6, 7]},
    {"prompt": "w5", "chosen": "w6", "rejected": "w7"},
    {"chosen": CHAT, "rejected": [*CHAT[:1], {"role": "assistant", "content": "w8"}]},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
VALID = {
    ".txt": "w5 w6 w7 " * 9,
    ".md": "# w5\n" * 9,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(RECORDS),
    ".csv": 'id,text\n1,"w5, w6"\n2,w7\n',
    ".tsv": "prompt\tcompletion\nw5\tw6\n",
}
# what stands where something else is expected
ODD = [
    None,
    True,
    0,
    -1,
    5,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "w5",
    "\ud83d",
    "\0",
    [],
    [[]],
    [None],
    {},
    {"a": None},
]
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama)


def result_or_sentence(work: Callable[[], Any]) -> bool:
    """Whether the work came to an end; else it said why not, in one sentence."""
    try:
        work()
    except XecoError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and "Traceback" not in sentence, sentence
        return False
    return True


def read_by_all(file: Path, tokenizer: Any, folder: Path) -> list[bool]:
    """Calibration, healing and preferences, on one file."""
    name = str(file)
    return [
        result_or_sentence(lambda: read_windows(name, folder, length=8, num_tokens=2048)),
        result_or_sentence(lambda: list(read_documents(name, tokenizer, vocabulary=96))),
        result_or_sentence(lambda: list(read_documents(name, tokenizer, vocabulary=96, assistant_only=True))),
        result_or_sentence(lambda: read_preferences(name, tokenizer)),
    ]


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of a file of some kind and packing, and bytes that have little or something to do with it."""
    kind, packing = draw(st.sampled_from(sorted(VALID))), draw(st.sampled_from(sorted(PACKED)))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]))
    content, place = draw(st.binary(max_size=64)), draw(st.floats(0, 1))
    valid = VALID[kind].encode(encoding)
    whole = PACKED[packing](valid)
    at = int(place * len(whole))
    ways = (
        content,
        whole[:at] + content + whole[at:],
        whole[:at] + content + whole[at + len(content) :],
        PACKED[packing](valid[: int(place * len(valid))] + content),
        whole[:at],
    )
    return f"a{kind}{packing}", draw(st.sampled_from(ways))


@SETTINGS
@given(damaged=damaged_files())
def test_any_bytes_in_any_file(damaged: tuple[str, bytes], tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    name, content = damaged
    (tmp_path / name).write_bytes(content)
    read_by_all(tmp_path / name, tokenizer, llama)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the way to it."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at a place; with `...`, with nothing there."""
    if not path:
        return None if new is ... else new
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return value


def test_any_value_in_any_field_of_a_record(tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    """All of them, one by one: JSON lines and JSON, and encoded on their own, where no file comes between."""
    tried = 0
    for number, record in enumerate(RECORDS):
        for path in places(record):
            for odd in (*ODD, ...):
                changed = replaced(record, path, odd)
                others = [*RECORDS[:number], changed, *RECORDS[number + 1 :]]
                if isinstance(changed, dict):
                    for assistant_only in (False, True):
                        encoder = Encoder(tokenizer=tokenizer, name="a", flag="--data", assistant_only=assistant_only)
                        result_or_sentence(lambda: encoder.encode(changed))  # noqa: B023
                file = tmp_path / "a.jsonl"
                file.write_text("\n".join(map(json.dumps, others)))
                result_or_sentence(lambda: list(read_documents(str(file), tokenizer, vocabulary=96)))  # noqa: B023
                result_or_sentence(lambda: read_preferences(str(file), tokenizer))  # noqa: B023
                tried += 1
    assert tried > 1000
    print(f"{tried} changed records")


@pytest.mark.slow
def test_what_is_valid_is_read(tokenizer: Any, llama: Path, tmp_path: Path) -> None:
    """So that the others do not pass because all is refused."""
    for record in RECORDS[:-2]:
        file = tmp_path / "a.jsonl"
        file.write_text((json.dumps(record) + "\n") * 600)
        assert read_by_all(file, tokenizer, llama)[:2] == [True, True]
    for record in RECORDS[-2:]:
        file.write_text((json.dumps(record) + "\n") * 2)
        assert read_by_all(file, tokenizer, llama)[3]


def tokenizer_files(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}


def word_tokenizer(folder: Path, llama: Path) -> None:
    """Words, of which a few are enough."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama / name, folder)
    data = tokenizer_files(folder)["tokenizer.json"]
    words = data["model"]["vocab"]
    data["model"]["vocab"] = {word: words[word] for word in sorted(words, key=lambda word: words[word])[:8]}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def piece_tokenizer(folder: Path, llama: Path) -> None:
    """Byte pairs with a part of every kind: normalizer, pre-tokenizer, post-processor, decoder."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "w", "5", "\u0120", "w5", "\u0120w5"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("w", "5"), ("\u0120", "w5")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "w")])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 6), ("</s>", 7)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (llama / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)


@pytest.fixture(params=[word_tokenizer, piece_tokenizer])
def model_folder(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Path:
    """A folder with what belongs to a small tokenizer, and the size of the vocabulary."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    request.param(folder, llama)
    return folder


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for record in (RECORDS[0], RECORDS[1]):
        Encoder(tokenizer=tokenizer, name="a", flag="--data", marks=True).encode(record)


@pytest.mark.slow
def test_any_value_in_any_field_of_a_tokenizer(model_folder: Path) -> None:
    """Every field of tokenizer.json and tokenizer_config.json, with a few values each; and without it."""
    tried = fields = 0
    text = model_folder / "a.txt"
    text.write_text("w5 w6 " * 600)
    assert result_or_sentence(lambda: use_tokenizer(model_folder))
    for name, data in tokenizer_files(model_folder).items():
        whole = (model_folder / name).read_text()
        for path in places(data):
            fields += 1
            for odd in (None, 5, -1, 1.5, "w5", [], {}, [None], ...):
                (model_folder / name).write_text(json.dumps(replaced(data, path, odd)))
                result_or_sentence(lambda: use_tokenizer(model_folder))
                result_or_sentence(lambda: read_windows(str(text), model_folder, length=8, num_tokens=2048))
                tried += 1
        (model_folder / name).write_text(whole)
    print(f"{fields} fields, {tried} changed files")


@pytest.mark.slow
@SETTINGS
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    place=st.floats(0, 1),
    content=st.binary(max_size=9),
)
def test_any_bytes_in_a_tokenizer_file(name: str, place: float, content: bytes, model_folder: Path) -> None:
    whole = (model_folder / name).read_bytes()
    at = int(place * len(whole))
    for made in (whole[:at], whole[:at] + content + whole[at:], whole[:at] + content + whole[at + len(content) :]):
        (model_folder / name).write_bytes(made)
        result_or_sentence(lambda: use_tokenizer(model_folder))
    (model_folder / name).write_bytes(whole)

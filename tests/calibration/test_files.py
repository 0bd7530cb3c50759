"""Text files as they are found on disk: every kind, packing and encoding gives the same records; damage is one sentence."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import importlib.util
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xeco_convert.calibration import files
from xeco_convert.calibration.files import is_running_text, read_records
from xeco_convert.errors import CheckpointError

TEXTS = ["an old story", 'of "quotes", commas\nand lines', "жук, 漢字, 🙂"]
RECORDS = [{"text": text} for text in TEXTS]
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def table(delimiter: str) -> str:
    quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
    return "".join(
        f"{number}{delimiter}{field}\n" for number, field in zip(["id", 1, 2, 3], ["text", *quoted], strict=True)
    )


KINDS = {
    "jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "ndjson": "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
    "json": json.dumps(RECORDS, indent=1),
    "csv": table(","),
    "tsv": table("\t"),
}
ENCODINGS = {
    "utf-8": b"",
    "utf-8 with a mark": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def encoded(text: str, encoding: str) -> bytes:
    return ENCODINGS[encoding] + text.encode(encoding.split(maxsplit=1)[0])


def texts(file: Path) -> list[Any]:
    return [record["text"] for record in read_records(str(file))]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_packing_gives_the_same_records(kind: str, packing: str, tmp_path: Path) -> None:
    for suffix in (f"{kind}{packing}", f"{kind}{packing}".upper()):
        file = tmp_path / f"some.words.{suffix}"
        file.write_bytes(PACKED[packing](KINDS[kind].encode()))
        assert texts(file) == TEXTS


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [*KINDS, "txt", "MD"])
def test_every_encoding_gives_the_same_records(
    kind: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 5)  # so that characters and line ends are cut
    file = tmp_path / f"a.{kind}"
    running = "\n".join(TEXTS)
    file.write_bytes(encoded(KINDS.get(kind, running).replace("\n", "\r\n"), encoding))
    assert texts(file) == ([running] if kind not in KINDS else TEXTS)
    assert is_running_text(str(file)) is (kind not in KINDS)


def test_lines_of_json_are_read_under_the_name_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(KINDS["jsonl"])
    assert texts(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0]))
    assert texts(tmp_path / "a.json") == TEXTS[:1]
    (tmp_path / "a.json").write_text("[[1, 2], []]")
    assert list(read_records(str(tmp_path / "a.json"))) == [{"input_ids": [1, 2]}, {"input_ids": []}]


def test_a_separator_that_json_leaves_alone_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one\u2028two"}\n{"text": "three\x85"}\n', encoding="utf-8")
    assert texts(tmp_path / "a.json") == ["one\u2028two", "three\x85"]


def test_fields_of_a_table_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'long ' * 100_000}\n")
    assert len(texts(tmp_path / "a.csv")[0]) == 500_000


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
@pytest.mark.parametrize("name", ["a.parquet", "A [1].PARQUET"])
def test_tables_leave_out_what_was_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file stores every field of every struct: null where the record had none."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chats = [
        {"messages": [{"role": "user", "content": "hello"}], "tools": [{"name": "a", "limit": 3}]},
        {"messages": [{"role": "tool", "content": "5", "name": "a"}], "tools": [{"name": "b"}]},
    ]
    datasets.Dataset.from_list(chats).to_parquet(str(tmp_path / name))
    assert list(read_records(str(tmp_path / name))) == chats


def broken(packing: str) -> bytes:
    return PACKED[packing](KINDS["jsonl"].encode() * 50)[:-20]


BAD: dict[str, tuple[str, bytes, str]] = {
    "latin-1": ("a.txt", "Once upon a caf\xe9.".encode("latin-1"), "byte 15 is not valid UTF-8, .*save it as UTF-8"),
    "latin-1 far in": ("a.jsonl", b'{"text": "x"}\n' * 99_999 + b"\xff", "byte 1399986 is not valid UTF-8"),
    "behind a mark": (
        "a.txt",
        codecs.BOM_UTF8 + b"ab\xff",
        "byte 5 is not valid UTF-8, expected UTF-8 text, as its byte",
    ),
    "cut inside a character": ("a.md", "cut 漢".encode()[:-1], "byte 4 is not valid UTF-8"),
    "half of utf-16": (
        "a.txt",
        codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"\x00\xd8",
        "byte 6 is not valid UTF-16-LE",
    ),
    "utf-16 without a mark": (
        "a.txt",
        "Once upon".encode("utf-16-le"),
        "a NUL character .*UTF-16 without a byte order mark",
    ),
    "latin-1 table": ("a.csv", "text\ncaf\xe9\n".encode("latin-1"), "byte 8 is not valid UTF-8"),
    "packed latin-1": ("a.txt.gz", gzip.compress(b"caf\xe9"), "byte 3 is not valid UTF-8"),
    "half an emoji in a line": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "\\ud83d"}\n',
        r"line 2: \\ud83d is half of a character",
    ),
    "half an emoji in an array": (
        "a.json",
        b'[{"text": "x"}, {"a": ["\\uDE00"]}]',
        r"record 2: \\ude00 is half of a char",
    ),
    "half an emoji as a name": ("a.jsonl", b'{"\\uD83D": 1}', r"line 1: \\ud83d is half"),
    "no gzip": ("a.jsonl.gz", KINDS["jsonl"].encode(), r"is damaged, or no \.gz file \(Not a gzipped file"),
    "half a gzip": ("a.jsonl.gz", broken(".gz"), r"is damaged, or no \.gz file"),
    "half a bzip2": ("a.jsonl.bz2", broken(".bz2"), r"is damaged, or no \.bz2 file"),
    "no bzip2": ("a.csv.bz2", b"text\n", r"could not be read \(Invalid data stream\)"),
    "half an xz": ("a.txt.xz", broken(".xz"), r"is damaged, or no \.xz file"),
    "no xz": ("a.json.XZ", b"[[1]]", r"is damaged, or no \.xz file"),
    "no parquet": ("a.parquet", b"PAR1 and more", "could not be opened"),
    "packed parquet": ("a.parquet.gz", b"", r"found \.parquet\.gz; read are \.txt, \.md, "),
    "another suffix": ("a.log", b"text", r"found \.log; read are \.txt, \.md, .* and \.parquet: rename or convert"),
    "no suffix": ("words", b"text", "found no suffix; read are"),
    "packed without a suffix": ("a.gz", gzip.compress(b"text"), r"found \.gz; read are"),
    "deep json": ("a.json", b"[" * 100_000, "found something that is no JSON"),
    "deep json in a line": (
        "a.jsonl",
        b"[" * 100_000,
        "line 1: expected a JSON object, found something that is no JSON",
    ),
    "a long number": (
        "a.jsonl",
        b'{"input_ids": [' + b"9" * 5000 + b"]}",
        "line 1: expected a JSON object, found something",
    ),
    "no json at all": ("a.json", b"", "expected a JSON array .* found something that is no JSON|found null"),
    "lists and records": ("a.json", b"[[1], {}]", "found an array with an array and an object in it"),
    "null": ("a.jsonl", b"null\n", "line 1: expected a JSON object, found null"),
    "a short row": ("a.csv", b"id,text\n1,x\n2\n", "line 3: expected 2 fields, as the first line names, found 1"),
    "a long row": ("a.tsv", b"text\na\tb\n", "line 2: expected 1 fields, as the first line names, found 2"),
    "an open quote": ("a.csv", b'text\n"never closed\nagain\n', "line 3: is no row of a table"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_told_in_one_sentence(case: str, tmp_path: Path) -> None:
    name, content, sentence = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as refused:
        list(read_records(str(tmp_path / name), "--data"))
    assert str(refused.value).startswith(f"--data: {tmp_path / name}") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.JSON", "a.csv.gz", "a.parquet"])
def test_a_folder_or_nothing_by_the_name_of_a_file_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not found; give an existing file"):
        list(read_records(str(tmp_path / name)))
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="is a folder, expected a file"):
        list(read_records(str(tmp_path / name)))


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(CheckpointError, match=r"could not be read \(Permission denied\)"):
        list(read_records(str(tmp_path / "a.txt")))


def test_zstandard_is_read_where_python_knows_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    if sys.version_info < (3, 14):
        with pytest.raises(CheckpointError, match=r"expected Python 3.14 or newer to read \.zst, found 3\.\d+; unpack"):
            list(read_records(str(tmp_path / "a.jsonl.zst")))
        return
    from compression import zstd  # type: ignore[import-not-found]

    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(KINDS["jsonl"].encode()))
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS

"""Records of text files and data sets: what --calibration, --data and --preferences name.

A suffix says what a file holds, a second one how it is compressed; case does not matter. Text is UTF-8, or UTF-16 or UTF-32
where a byte order mark says so. What does not decode is refused and never replaced: a model would learn the replacements.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from xeco_convert.errors import CheckpointError, reason_of

RUNNING_TEXT = (".txt", ".md")
_KINDS = (*RUNNING_TEXT, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_KINDS_IN_WORDS = f"{', '.join(_KINDS[:-1])} (these also with {', '.join(_PACKED)} behind) and {_KINDS[-1]}"
# longest first: the mark of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHUNK_BYTES = 2**20
_KIND_OF_VALUE = {
    list: "an array",
    dict: "an object",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_records(name: str, flag: str = "--calibration") -> Iterator[Mapping[str, Any]]:
    """Records of a file, or of a data set by name; `flag` names the option in errors.

    A file of running text is one record. Raises `CheckpointError` for what is missing, not read, damaged or not valid in its
    encoding, and for a data set that cannot be opened.
    """
    kind, packing = file_kind(name)
    if os.path.isdir(name) and (kind in _KINDS or packing):
        raise CheckpointError(f"{flag}: {name} is a folder, expected a file; give a file in it.")
    if os.path.exists(name) and not os.path.isdir(name):
        yield from _TextFile(Path(name), flag).records()
    elif kind in _KINDS or packing:
        raise CheckpointError(f"{flag}: {name} was not found; give an existing file or a data set's name.")
    else:
        yield from _data_set(name, flag)


def is_running_text(name: str) -> bool:
    """Whether a file is one text, instead of records."""
    return file_kind(name)[0] in RUNNING_TEXT


def file_kind(name: str) -> tuple[str, str]:
    """What a file holds and how it is packed, by its suffixes in small letters; empty where there is none."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _PACKED else ""
    return (suffixes[-1] if suffixes else ""), packing


class _TextFile:
    """One file, of any kind and packing."""

    def __init__(self, path: Path, flag: str) -> None:
        self._path = path
        self._where = f"{flag}: {path}"
        self._flag = flag
        self._kind, self._packing = file_kind(str(path))

    def records(self) -> Iterator[Mapping[str, Any]]:
        """What the file holds."""
        if self._kind not in _KINDS or (self._kind == ".parquet" and self._packing):
            kind = f"{self._kind}{self._packing}" or "no suffix"
            raise CheckpointError(
                f"{self._where}: expected a suffix that says what the file holds, found {kind}; read are {_KINDS_IN_WORDS}: "
                "rename or convert the file."
            )
        with self._told():
            if self._kind in RUNNING_TEXT:
                yield {"text": "".join(self._pieces())}
            elif self._kind == ".parquet":
                yield from _parquet(self._path, self._flag)
            elif self._kind == ".json":
                yield from self._json()
            elif self._kind in (".csv", ".tsv"):
                yield from self._table("," if self._kind == ".csv" else "\t")
            else:
                yield from self._json_lines(self._lines())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the disk and the decompression say, in one sentence."""
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise CheckpointError(
                f"{self._where}: is damaged, or no {self._packing} file ({reason_of(error)}); pack or download it again."
            ) from None
        except (OSError, ValueError) as error:  # bz2 and zstd raise these for damaged data
            reason = getattr(error, "strerror", None) or reason_of(error)
            raise CheckpointError(f"{self._where}: could not be read ({reason}); check the file.") from None

    def _opened(self) -> IO[bytes]:
        if self._packing == ".gz":
            return gzip.open(self._path)  # type: ignore[return-value]
        if self._packing == ".bz2":
            return bz2.open(self._path)
        if self._packing == ".xz":
            return lzma.open(self._path)
        if self._packing == ".zst":
            return self._opened_zstandard()
        return self._path.open("rb")

    def _opened_zstandard(self) -> IO[bytes]:
        try:
            from compression import zstd  # type: ignore[import-not-found]
        except ImportError:
            raise CheckpointError(
                f"{self._where}: expected Python 3.14 or newer to read .zst, found {sys.version_info.major}."
                f"{sys.version_info.minor}; unpack the file, or pack it as .gz."
            ) from None
        opened: IO[bytes] = zstd.open(self._path)
        return opened

    def _pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte, every line end as a newline. Raises `CheckpointError` with the byte that is
        not valid; of a compressed file it is the byte of what was packed."""
        with self._opened() as stream:
            start = stream.read(4)
            mark, encoding = next((pair for pair in _MARKS if start.startswith(pair[0])), (b"", "utf-8"))
            decoder, newlines = codecs.getincrementaldecoder(encoding)(), io.IncrementalNewlineDecoder(None, True)
            chunk, offset = start[len(mark) :] + stream.read(_CHUNK_BYTES), len(mark)
            while True:
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise self._undecodable(encoding, offset - waiting + error.start, bool(mark)) from None
                if "\0" in text:
                    raise self._with_nul(encoding, offset)
                yield newlines.decode(text, final=not chunk)
                if not chunk:
                    return
                offset += len(chunk)
                chunk = stream.read(_CHUNK_BYTES)

    def _undecodable(self, encoding: str, offset: int, marked: bool) -> CheckpointError:
        said = "as its byte order mark says" if marked else "or UTF-16 or UTF-32 with a byte order mark"
        return CheckpointError(
            f"{self._where}: byte {offset} is not valid {encoding.upper()}, expected {encoding.upper()} text, {said}; "
            "save it as UTF-8 (iconv -f LATIN1 -t UTF-8, if that is what it is)."
        )

    def _with_nul(self, encoding: str, offset: int) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: a NUL character at or behind byte {offset}, expected {encoding.upper()} text; UTF-16 without a byte "
            "order mark and binary files have such: save it as UTF-8 text."
        )

    def _lines(self) -> Iterator[str]:
        """The lines, each with its newline but for the last."""
        waiting: list[str] = []
        for piece in self._pieces():
            first, *others = piece.split("\n")
            waiting.append(first)
            for other in others:
                yield "".join(waiting) + "\n"
                waiting = [other]
        if any(waiting):
            yield "".join(waiting)

    def _json_lines(self, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{self._where}, line {number}"
            record, _ = _parsed(line)
            if not isinstance(record, dict):
                raise CheckpointError(f"{where}: expected a JSON object, found {_in_words(record, line)}.")
            yield _whole_characters(record, line, where)

    def _json(self) -> Iterator[Mapping[str, Any]]:
        """One JSON value: arrays of token ids (text that is tokenized already), or records; JSON lines under this name."""
        text = "".join(self._pieces())
        value, several = _parsed(text)
        if several:
            yield from self._json_lines(text.split("\n"))
            return
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, dict) for item in items):
            for number, record in enumerate(items, start=1):
                yield _whole_characters(record, text, f"{self._where}, record {number}")
        elif isinstance(value, list) and all(isinstance(item, list) for item in items):
            yield from ({"input_ids": item} for item in items)
        else:
            raise CheckpointError(
                f"{self._where}: expected a JSON array of arrays of token ids, or of records, found "
                f"{_in_words(value, text)}; change the file."
            )

    def _table(self, delimiter: str) -> Iterator[Mapping[str, Any]]:
        """The first row names the columns."""
        limit = csv.field_size_limit(sys.maxsize)  # a field is a whole document
        rows = csv.reader(self._lines(), delimiter=delimiter, strict=True)
        try:
            columns = next(rows, [])
            for row in rows:
                if row and len(row) != len(columns):
                    raise CheckpointError(
                        f"{self._where}, line {rows.line_num}: expected {len(columns)} fields, as the first line names, found "
                        f"{len(row)}; quote fields that hold {delimiter!r} or line ends."
                    )
                if row:
                    yield dict(zip(columns, row, strict=True))
        except csv.Error as error:
            raise CheckpointError(
                f"{self._where}, line {rows.line_num}: is no row of a table ({error}); put fields with quotes into quotes, "
                "and write a quote in them twice."
            ) from None
        finally:
            csv.field_size_limit(limit)


def _parsed(text: str) -> tuple[Any, bool]:
    """The JSON value, None where it is none; and whether several stand one behind the other."""
    try:
        return json.loads(text), False
    except json.JSONDecodeError as error:
        return None, error.msg == "Extra data"
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        return None, False


def _in_words(value: Any, text: str) -> str:
    """What stands in place of a JSON value that was expected."""
    if value is None:
        return "null" if text.strip() in ("", "null") else "something that is no JSON"
    within = " and ".join(sorted({_KIND_OF_VALUE[type(item)] for item in value})) if isinstance(value, list) else ""
    return _KIND_OF_VALUE[type(value)] + (f" with {within} in it" if within else "")


def _whole_characters(record: dict[str, Any], text: str, where: str) -> dict[str, Any]:
    """The record, if none of its text is cut off inside a character, which JSON can write and no tokenizer reads."""
    if _SURROGATE.search(text):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start].encode("ascii", "backslashreplace").decode()
            raise CheckpointError(
                f"{where}: {half} is half of a character (an emoji cut in two), expected whole ones; cut the text elsewhere, or "
                "leave that out."
            ) from None
    return record


def _parquet(path: Path, flag: str) -> Iterator[Mapping[str, Any]]:
    from glob import escape

    return _loaded(str(path), flag, "parquet", data_files=escape(str(path)), split="train")


def _data_set(name: str, flag: str) -> Iterator[Mapping[str, Any]]:
    """A named data set: name, or name:split."""
    known, _, split = name.partition(":")
    return _loaded(name, flag, known, split=split or "train")


def _loaded(name: str, flag: str, *arguments: Any, **named: Any) -> Iterator[Mapping[str, Any]]:
    """Records that the datasets library streams. Its tables give every struct of a column the same fields: those that are
    null were not there."""
    try:
        import datasets
    except ImportError:
        raise CheckpointError(
            f"{flag}: {name} needs the datasets library: pip install 'xeco-convert[data]', or give .txt or .jsonl."
        ) from None
    try:
        for record in datasets.load_dataset(*arguments, **named, streaming=True):
            yield {key: _without_nulls(value) for key, value in record.items()}
    except Exception as error:  # the library passes on errors of many libraries below it
        raise CheckpointError(f"{flag}: {name} could not be opened ({reason_of(error)}).") from None


def _without_nulls(value: Any) -> Any:
    """The value, without null fields of objects in it."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

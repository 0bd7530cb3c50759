"""Windows of documents from every kind of file, what counts in them, and sentences for text that will not do."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.text import read_windows
from xeco_convert.calibration.windows import LEAST_TOKENS, windows_of_documents
from xeco_convert.errors import CheckpointError

WORDS = [f"w{3 + number % 90}" for number in range(1500)]
IDS = [3 + number % 90 for number in range(1500)]
TEXT = " ".join(WORDS)
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")


def windows_of(documents: list[list[int]], length: int = 4, num_tokens: int = 100) -> CalibrationWindows:
    return windows_of_documents(
        documents, length=length, num_tokens=num_tokens, special_ids=frozenset({1, 2}), description="documents"
    )


def test_documents_are_cut_padded_and_never_joined() -> None:
    windows = windows_of([[3, 4, 5, 6, 7, 8], [], [9], [10, 11, 12, 13]])
    assert windows.ids.tolist() == [[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0], [10, 11, 12, 13]]
    assert windows.counts.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert windows.num_tokens == 11 and windows.ids.dtype == torch.int64


def test_special_tokens_are_there_and_do_not_count() -> None:
    windows = windows_of([[1, 5, 2, 6]])
    assert windows.ids.tolist() == [[1, 5, 2, 6]]
    assert windows.counts.int().tolist() == [[0, 1, 0, 1]]


def test_no_more_windows_than_asked_for() -> None:
    assert windows_of([[5] * 100, [6] * 100], num_tokens=9).ids.shape == (3, 4)
    assert windows_of([], num_tokens=9).ids.shape == (0, 4)


def test_windows_are_spread_over_all_of_a_longer_text() -> None:
    """Those that calibrate, those that choose between fits behind them, and those that measure at the end: each part of them."""
    starts = windows_of([list(range(400)), list(range(400, 1200))], num_tokens=480).ids[:, 0]
    assert len(starts) == len(set(starts.tolist())) == 120
    for part in (starts, starts[:60], starts[60:90], starts[-30:]):
        gaps = torch.cat([torch.tensor([0]), part.sort().values, torch.tensor([1200])]).diff()
        assert float(gaps.max()) <= 3.5 * 1200 / len(part)
    unequal = windows_of([[5] * 3, [6] * 40, *[[7]] * 50], num_tokens=20)
    assert 20 <= unequal.num_tokens < 24 and unequal.ids.shape[0] > 10


def test_ends_of_documents_are_taken_where_the_rest_is_not_enough() -> None:
    documents = [[5] * 11, [6] * 3, [7] * 9]
    enough = windows_of(documents, num_tokens=19).counts.sum(dim=1).tolist()
    assert sorted(enough) == [3, 4, 4, 4, 4]  # a short document is no end
    assert sorted(windows_of(documents, num_tokens=21).counts.sum(dim=1).tolist())[0] < 3


def test_all_of_a_shorter_text_is_taken_in_its_order() -> None:
    assert windows_of([list(range(3, 13)), [20]], num_tokens=11).ids[:, 0].tolist() == [3, 7, 11, 20]


def test_the_first_windows_alone() -> None:
    windows = windows_of([[5] * 12]).first(2)
    assert windows.ids.shape == windows.counts.shape == (2, 4) and windows.description == "documents"


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n\n"


FILES: dict[str, tuple[str, str]] = {
    "text": ("a.txt", TEXT),
    "json lines": ("a.jsonl", lines({"text": TEXT})),
    "chats": ("a.jsonl", lines({"messages": [{"role": "user", "content": TEXT}]})),
    "token ids in json lines": ("a.jsonl", lines({"input_ids": IDS})),
    "token ids": ("a.json", json.dumps([IDS])),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_tokens(kind: str, llama: Path, tmp_path: Path) -> None:
    name, content = FILES[kind]
    (tmp_path / name).write_text(content)
    windows = read_windows(str(tmp_path / name), llama, length=50, num_tokens=1200)
    assert windows.ids.shape == (24, 50) and bool(windows.counts.all())
    assert windows.ids.tolist() == windows_of([IDS], length=50, num_tokens=1200).ids.tolist()
    assert read_windows(str(tmp_path / name), llama, length=50, num_tokens=1500).ids.flatten().tolist() == IDS
    assert windows.description == str(tmp_path / name)


@needs_datasets
def test_a_parquet_file_gives_the_same_tokens(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": [" ".join(WORDS[:750]), " ".join(WORDS[750:])]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    windows = read_windows(str(tmp_path / "a.parquet"), llama, length=50, num_tokens=1500)
    assert windows.ids[windows.counts].tolist() == IDS


def test_several_documents_stay_apart_and_windows_are_no_longer_than_them(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(*({"text": " ".join(WORDS[start : start + 30])} for start in range(0, 1500, 30))))
    windows = read_windows(str(file), llama, length=512, num_tokens=1500)
    assert windows.ids.shape == (50, 30) and windows.ids.flatten().tolist() == IDS


def test_special_tokens_in_a_text_do_not_count(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"<s> {TEXT} </s>")
    windows = read_windows(str(tmp_path / "a.txt"), llama, length=1502, num_tokens=2000)
    assert windows.ids[0, [0, -1]].tolist() == [1, 2]
    assert windows.num_tokens == 1500


@pytest.mark.parametrize(
    ("content", "found"), [("", 0), (" \n", 0), ("w5", 1), (" ".join(WORDS[: LEAST_TOKENS - 1]), LEAST_TOKENS - 1)]
)
def test_too_little_text_says_how_much_is_needed(content: str, found: int, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(CheckpointError, match=rf"holds {found} usable tokens, expected at least 1024.*give more text"):
        read_windows(str(tmp_path / "a.txt"), llama, length=50, num_tokens=1200)


def test_just_enough_text_will_do(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(WORDS[:LEAST_TOKENS]))
    assert read_windows(str(tmp_path / "a.txt"), llama, length=50, num_tokens=1200).num_tokens == LEAST_TOKENS


def test_text_in_another_script_is_refused(tmp_path: Path) -> None:
    from xeco_convert.demo import MODEL_FOLDER

    assert read_windows_of_unknowns(tmp_path, MODEL_FOLDER, known=True).num_tokens >= LEAST_TOKENS
    with pytest.raises(CheckpointError, match=r"maps \d+% of .* to its unknown token; give text in the model's own"):
        read_windows_of_unknowns(tmp_path, MODEL_FOLDER, known=False)


def read_windows_of_unknowns(tmp_path: Path, folder: Path, *, known: bool) -> CalibrationWindows:
    from xeco_convert.demo.language import generate_text

    text = generate_text(60, seed=5)
    (tmp_path / "a.txt").write_text(text if known else "жук " * 3000, encoding="utf-8")
    return read_windows(str(tmp_path / "a.txt"), folder, length=128, num_tokens=4096)


def test_unknown_tokens_are_counted_by_share() -> None:
    ids = torch.full((1, 2000), 5)
    ids[0, :500] = 9
    windows = CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="text")
    with pytest.raises(CheckpointError, match="maps 25% of text"):
        windows.checked(9)
    assert windows.checked(None) is windows and windows.checked(8) is windows


BAD: dict[str, tuple[str, str | None, str]] = {
    "missing text": ("a.txt", None, "was not found; give an existing file"),
    "missing parquet": ("a.parquet", None, "was not found"),
    "records of another kind": (
        "a.jsonl",
        lines({"prompt": "w5"}),
        r"expected records with text, messages, .* found prompt \(str\)",
    ),
    "a number for text": ("a.jsonl", lines({"text": 5}), r"expected records with text, .* found text \(int\)"),
    "no json": ("a.jsonl", '{"text": "w5"}\nno json\n', "line 2: expected a JSON object"),
    "an array line": ("a.jsonl", "[1, 2]\n", "line 1: expected a JSON object"),
    "json of another kind": (
        "a.json",
        "5",
        "expected a JSON array of arrays of token ids, or of records, found a number",
    ),
    "a record of another kind": ("a.json", '{"a": 1}', r"expected records with text, .* found a \(int\)"),
    "broken json": ("a.json", "[[1,", "expected a JSON array of arrays of token ids"),
    "words for ids": ("a.json", '[["w5", "w6"]]', "--calibration: .*token ids"),
    "ids beyond the vocabulary": ("a.json", json.dumps([[5000] * 1500]), "--calibration: .*token ids"),
    "negative ids": ("a.json", json.dumps([[-1] * 1500]), "--calibration: .*token ids"),
    "words for ids in lines": ("a.jsonl", lines({"input_ids": ["w5"]}), "--calibration: .*token ids"),
    "messages of another kind": ("a.jsonl", lines({"messages": ["hello"]}), "--calibration: .*messages"),
    "no utf-8": ("a.jsonl", "\udcff\udcfe", "--calibration: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_a_sentence(case: str, llama: Path, tmp_path: Path) -> None:
    name, content, sentence = BAD[case]
    if content is not None:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=sentence):
        read_windows(str(tmp_path / name), llama, length=50, num_tokens=1200)


def test_chats_need_a_chat_template(llama: Path, tmp_path: Path, copy_without: Callable[[Path, str], Path]) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"messages": [{"role": "user", "content": TEXT}]}))
    folder = copy_without(llama, "chat_template.jinja")
    with pytest.raises(CheckpointError, match="has no chat template; give text"):
        read_windows(str(tmp_path / "a.jsonl"), folder, length=50, num_tokens=1200)


def test_text_needs_a_tokenizer(llama: Path, tmp_path: Path, copy_without: Callable[[Path, str], Path]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    folder = copy_without(llama, "tokenizer")
    with pytest.raises(CheckpointError, match=r"no tokenizer could be loaded.*add the tokenizer files"):
        read_windows(str(tmp_path / "a.txt"), folder, length=50, num_tokens=1200)

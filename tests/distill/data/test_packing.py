"""Packing keeps every token, fills rows, and lets no document see another."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from xeco_convert.pretrained import load_causal_lm
from xeco_distill.data import Document, PackedRows, RowWriter, pack
from xeco_distill.teacher import hidden_states


@pytest.mark.parametrize("row_length", [2, 7, 129])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_is_in_one_row_and_no_row_is_too_long(row_length: int, seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice([0, 1, 2, 3, chance.randrange(1, 400)]) for _ in range(200)]
    rows = pack(lengths, row_length)
    seen: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        assert 0 < row.num_tokens <= row_length
        assert row.num_tokens == sum(end - start for _, start, end in row.pieces)
        for document, start, end in row.pieces:
            seen.setdefault(document, []).append((start, end))
    for document, length in enumerate(lengths):
        pieces = sorted(seen.get(document, []))
        covered = [token for start, end in pieces for token in range(start, end)]
        left_out = 1 if length % row_length == 1 else 0  # one token alone teaches nothing
        assert covered == list(range(length - left_out))


def test_rows_are_nearly_full() -> None:
    chance = random.Random(3)
    lengths = [chance.randrange(5, 100) for _ in range(1000)]
    rows = pack(lengths, 128)
    assert sum(lengths) / (128 * len(rows)) > 0.98


def test_no_documents_give_no_rows() -> None:
    assert pack([], 16) == [] and pack([1, 0, 1], 16) == []


def written(folder: Path, documents: list[Document], length: int) -> PackedRows:
    writer = RowWriter(folder, length, padding=0)
    for document in documents:
        writer.add(document)
    return writer.finish()


def whole(ids: list[int]) -> Document:
    return Document(ids=ids, learned=[True] * len(ids))


def test_rows_hold_documents_positions_and_what_counts(tmp_path: Path) -> None:
    documents = [whole([5, 6, 7, 8]), Document(ids=[9, 10, 11], learned=[True, False, True])]
    rows = written(tmp_path, documents, 9)
    row = rows[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10, 11, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    # the last token of a document predicts nothing, and 10 is not to be learned
    assert row["mask"].tolist() == [True, True, True, False, False, True, False, False, False]
    assert row["targets"].tolist() == [6, 7, 8, 9, 10, 11, 0, 0, 5]
    assert int(rows.mask.sum()) == 4 and len(rows) == 1
    assert rows.documents(100) == [[5, 6, 7, 8], [9, 10, 11]]


def test_rows_that_were_not_finished_are_not_loaded(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, 8, padding=0)
    writer.add(whole([1, 2, 3]))
    assert PackedRows.load(tmp_path) is None
    writer.finish()
    loaded = PackedRows.load(tmp_path)
    assert loaded is not None and len(loaded) == 1


def test_blocks_bound_memory_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xeco_distill.data.rows._BLOCK_ROWS", 2)
    documents = [whole(list(range(1, 2 + number % 13))) for number in range(100)]
    rows = written(tmp_path, documents, 16)
    found = sorted(tuple(document) for document in rows.documents(10**6))
    assert found == sorted(tuple(document.ids) for document in documents if len(document.ids) > 1)


@torch.no_grad()
def test_a_packed_document_is_predicted_as_if_it_were_alone(converted_demo: Path, tmp_path: Path) -> None:
    model = load_causal_lm(converted_demo, torch.float32).eval()
    generator = np.random.default_rng(0)
    documents = [whole(generator.integers(3, 270, size).tolist()) for size in (17, 9, 23, 2)]
    rows = written(tmp_path, documents, 64)
    row = rows[0]
    packed = hidden_states(model, row["input_ids"][None], row["position_ids"][None])[0]
    starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 64]
    for document in documents:
        for start, _end in itertools.pairwise(starts):
            if row["input_ids"][start : start + len(document.ids)].tolist() == document.ids:
                alone = hidden_states(model, torch.tensor([document.ids]), None)[0]
                torch.testing.assert_close(packed[start : start + len(document.ids)], alone, rtol=1e-4, atol=1e-4)
                break
        else:
            raise AssertionError("document not found")

"""Training rows on disk: written as they are made, mapped into memory when they are read.

Letters: R rows, L tokens of a row.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xeco_convert.calibration.records import Document
from xeco_convert.files import write_json_whole

from ..data.packing import pack

_FILES = {"input_ids": np.int32, "position_ids": np.int32, "mask": np.bool_}
_BLOCK_ROWS = 4096  # rows whose documents are packed together: bounds memory, and packing gains little beyond it


@dataclass(frozen=True, kw_only=True)
class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows [R, L]: input_ids and position_ids (int32), and mask (bool): whether the prediction made at a token counts.

    Positions start at 0 with every document of a row, and so does the padding behind the last.
    """

    input_ids: Any
    position_ids: Any
    mask: Any

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.input_ids[index].astype(np.int64))
        return {
            "input_ids": ids,
            "position_ids": torch.from_numpy(self.position_ids[index].astype(np.int64)),
            "mask": torch.from_numpy(np.array(self.mask[index])),
            "targets": torch.cat([ids[1:], ids[:1]]),  # the last one is never masked in
            "row": torch.tensor(index),
        }

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.input_ids.shape[1])

    def part(self, rows: slice) -> PackedRows:
        """Some of the rows."""
        return PackedRows(input_ids=self.input_ids[rows], position_ids=self.position_ids[rows], mask=self.mask[rows])

    def in_memory(self) -> PackedRows:
        """A copy that needs no files."""
        return PackedRows(
            input_ids=np.array(self.input_ids), position_ids=np.array(self.position_ids), mask=np.array(self.mask)
        )

    def documents(self, num_tokens: int) -> list[list[int]]:
        """The documents of the first rows, about `num_tokens` tokens of them, padding left out."""
        found: list[list[int]] = []
        taken = 0
        for number in range(len(self)):
            if taken >= num_tokens:
                break
            ids, positions = self.input_ids[number], self.position_ids[number]
            starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                if self.mask[number, start:end].any():
                    found.append(ids[start:end].tolist())
                    taken += end - start
        return found

    @classmethod
    def load(cls, folder: Path) -> PackedRows | None:
        """Rows that were written whole, or None."""
        marker = folder / "rows.json"
        if not marker.is_file():
            return None
        shape = tuple(json.loads(marker.read_text(encoding="utf-8"))["shape"])
        arrays = {name: np.memmap(folder / f"{name}.bin", kind, "r", shape=shape) for name, kind in _FILES.items()}
        return cls(**arrays)


class RowWriter:
    """Collects documents, packs them block by block, and appends the rows to files in `folder`."""

    def __init__(self, folder: Path, row_length: int, padding: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._length = row_length
        self._padding = padding
        self._streams = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}
        self._waiting: list[Document] = []
        self._waiting_tokens = 0
        self.num_rows = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of rows written and documents waiting."""
        return self.num_rows * self._length + self._waiting_tokens

    def add(self, document: Document) -> None:
        """One document; very long ones are cut where a row is full."""
        self._waiting.append(document)
        self._waiting_tokens += len(document.ids)
        if self._waiting_tokens >= _BLOCK_ROWS * self._length:
            self._pack()

    def add_rows(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Whole rows [r, L] of one document each."""
        positions = np.broadcast_to(np.arange(self._length, dtype=np.int32), ids.shape)
        self._write(ids.astype(np.int32), positions, mask.astype(np.bool_))

    def copy_rows(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> None:
        """Rows that were packed already."""
        self._write(ids, positions, mask)

    def finish(self) -> PackedRows:
        """Write what is waiting and mark the rows as whole."""
        self._pack()
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        write_json_whole(self._folder / "rows.json", {"shape": [self.num_rows, self._length]})
        rows = PackedRows.load(self._folder)
        assert rows is not None
        return rows

    def _pack(self) -> None:
        layout = pack([len(document.ids) for document in self._waiting], self._length)
        shape = (len(layout), self._length)
        ids = np.full(shape, self._padding, dtype=np.int32)
        mask = np.zeros(shape, dtype=np.bool_)
        positions = np.zeros(shape, dtype=np.int32)
        for number, row in enumerate(layout):
            place = 0
            for document, start, end in row.pieces:
                size = end - start
                ids[number, place : place + size] = self._waiting[document].ids[start:end]
                positions[number, place : place + size] = np.arange(size)
                learned: Sequence[bool] = self._waiting[document].learned[start + 1 : end]
                mask[number, place : place + size - 1] = learned
                place += size
            positions[number, place:] = np.arange(self._length - place)
        self._write(ids, positions, mask)
        self._waiting, self._waiting_tokens = [], 0

    def _write(self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> None:
        useful = mask.any(axis=1)
        for name, array in (("input_ids", ids), ("position_ids", positions), ("mask", mask)):
            self._streams[name].write(np.ascontiguousarray(array[useful]).tobytes())
        self.num_rows += int(useful.sum())

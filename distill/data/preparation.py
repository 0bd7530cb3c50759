"""The rows of a run: read and packed, or sampled from the teacher, once; the last ones are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xeco_convert.tokenizer import load_tokenizer

from ..callbacks import Report
from ..data.documents import read_documents
from ..data.rows import PackedRows, RowWriter
from ..data.samples import SHARD_ROWS, SampleStore
from ..errors import DataError
from ..pair import ModelPair
from ..process import ProcessContext
from ..resume import RunFolder
from ..teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class RowRequest:
    """Rows of `pair.seq_length` tokens: how many to train on and how many to measure on, of `data` or, where that is None,
    sampled from the teacher. `assistant_only`: learn from assistant turns alone. `sample_cache`: a folder for samples that other
    runs may use."""

    pair: ModelPair
    training: int
    held_out: int
    data: str | None
    seed: int
    assistant_only: bool = False
    sample_cache: str | None = None

    @property
    def total(self) -> int:
        return self.training + self.held_out


def prepare_rows(
    request: RowRequest, work: RunFolder, process: ProcessContext, teacher: Callable[[], Teacher], report: Report
) -> tuple[PackedRows, PackedRows]:
    """Rows to train on and rows to measure on.

    The rows are shuffled with the run's seed before they are divided. Raises `DataError` where there is too little text.
    """
    rows = all_rows(request, work, process, teacher, report)
    held_out = min(request.held_out, max(1, len(rows) // 4))
    if len(rows) < 2:
        raise DataError(
            f"--data: {request.data}: only {len(rows)} rows of {request.pair.seq_length} tokens, expected at least 2 (one to "
            "train on, one to measure on); give more text, or a smaller --seq-length."
        )
    return rows.part(slice(0, len(rows) - held_out)), rows.part(slice(len(rows) - held_out, None))


def all_rows(
    request: RowRequest, work: RunFolder, process: ProcessContext, teacher: Callable[[], Teacher], report: Report
) -> PackedRows:
    """The rows, undivided, from disk where an earlier part of the run left them."""
    folder = work.path("rows")
    rows = PackedRows.load(folder)
    if rows is None:
        if request.data is None:
            _sample(request, work, process, teacher, report)
        elif process.is_main:
            _read(request, request.data, folder, report)
        process.barrier()
        rows = PackedRows.load(folder)
        assert rows is not None, "they were written just now"
    return rows


def _read(request: RowRequest, data: str, folder: Path, report: Report) -> None:
    """Documents until the budget and the held-out rows are filled, packed; then shuffled."""
    tokenizer = load_tokenizer(request.pair.student.folder)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    needed = request.total * request.pair.seq_length
    unshuffled = folder.with_name("rows-unshuffled")
    writer = RowWriter(unshuffled, request.pair.seq_length, padding)
    documents = read_documents(
        data,
        tokenizer,
        assistant_only=request.assistant_only,
        vocabulary=request.pair.student.config["vocab_size"],
    )
    for document in documents:
        writer.add(document)
        report("reading text", min(1.0, writer.num_tokens / needed), {})
        if writer.num_tokens >= needed:
            break
    _shuffle(writer.finish(), folder, needed // request.pair.seq_length, request.seed, padding)


def _shuffle(rows: PackedRows, folder: Path, most: int, seed: int, padding: int) -> None:
    """The first rows in a random order: neighbours in the data must not end up held out together."""
    count = min(len(rows), most)
    order = np.random.default_rng(seed).permutation(count)
    writer = RowWriter(folder, rows.length, padding)
    for start in range(0, count, 1024):
        part = order[start : start + 1024]
        writer.copy_rows(rows.input_ids[part], rows.position_ids[part], rows.mask[part])
    writer.finish()


def _sample(
    request: RowRequest, work: RunFolder, process: ProcessContext, teacher: Callable[[], Teacher], report: Report
) -> None:
    """Shards of the teacher's text, each process its own, then the rows from them."""
    needed = request.total
    cache = request.sample_cache
    store = SampleStore(
        work.path("samples") if cache is None else Path(cache),
        teacher=request.pair.teacher.fingerprint(),
        length=request.pair.seq_length,
        seed=request.seed,
    )
    shards = math.ceil(needed / SHARD_ROWS)
    missing = store.missing(shards)
    if missing:
        mine = missing[process.rank :: process.world]
        already = (shards - len(missing)) / shards
        model = teacher().model
        store.fill(model, mine, lambda done: report("sampling text", already + (1 - already) * done / len(mine), {}))
    process.barrier()
    if process.is_main:
        writer = RowWriter(work.path("rows"), request.pair.seq_length, 0)
        for ids, counts in _first_rows(store, needed):
            learned = torch.zeros_like(counts)
            learned[:, :-1] = counts[:, 1:]
            writer.add_rows(ids.numpy(), learned.numpy())
        writer.finish()


def _first_rows(store: SampleStore, needed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number in range(math.ceil(needed / SHARD_ROWS)):
        ids, counts = store.read(number)
        yield ids[: needed - number * SHARD_ROWS], counts[: needed - number * SHARD_ROWS]

"""The rows of a run: read and packed, or sampled from the teacher, once; the last ones are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from xeco_convert.tokenizer import load_tokenizer

from ..callbacks import Report
from ..data.documents import read_documents
from ..data.rows import PackedRows, RowWriter
from ..data.samples import SHARD_ROWS, SampleStore
from ..errors import DataError
from ..plan import HealingPlan
from ..stages.distillation import Place
from ..teacher import Teacher
from ..work import RunFolder


def prepare_rows(
    plan: HealingPlan, work: RunFolder, place: Place, teacher: Callable[[], Teacher], report: Report
) -> tuple[PackedRows, PackedRows]:
    """Rows to train on and rows to measure on.

    The rows are shuffled with the run's seed before they are divided. Raises `DataError` where there is too little text.
    """
    rows = all_rows(plan, work, place, teacher, report)
    held_out = min(plan.held_out_rows(), max(1, len(rows) // 4))
    if len(rows) < 2:
        raise DataError(
            f"--data: {plan.options.data}: only {len(rows)} rows of {plan.seq_length} tokens, expected at least 2 (one to "
            "train on, one to measure on); give more text, or a smaller --seq-length."
        )
    return rows.part(slice(0, len(rows) - held_out)), rows.part(slice(len(rows) - held_out, None))


def all_rows(
    plan: HealingPlan, work: RunFolder, place: Place, teacher: Callable[[], Teacher], report: Report
) -> PackedRows:
    """The rows, undivided, from disk where an earlier part of the run left them."""
    folder = work.path("rows")
    rows = PackedRows.load(folder)
    if rows is None:
        if plan.options.data is None:
            _sample(plan, work, place, teacher, report)
        elif place.is_main:
            _read(plan, folder, place.world, report)
        place.barrier()
        rows = PackedRows.load(folder)
        assert rows is not None
    return rows


def _read(plan: HealingPlan, folder: Path, world: int, report: Report) -> None:
    """Documents until the budget and the held-out rows are filled, packed; then shuffled."""
    options = plan.options
    assert options.data is not None
    tokenizer = load_tokenizer(plan.student.folder)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    wanted = (plan.sampled_rows(world) + plan.held_out_rows()) * plan.seq_length
    unshuffled = folder.with_name("rows-unshuffled")
    writer = RowWriter(unshuffled, plan.seq_length, padding)
    documents = read_documents(
        options.data,
        tokenizer,
        assistant_only=options.assistant_only,
        vocabulary=plan.student.config["vocab_size"],
    )
    for document in documents:
        writer.add(document)
        report("reading text", min(1.0, writer.num_tokens / wanted), {})
        if writer.num_tokens >= wanted:
            break
    _shuffle(writer.finish(), folder, wanted // plan.seq_length, options.seed, padding)


def _shuffle(rows: PackedRows, folder: Path, most: int, seed: int, padding: int) -> None:
    """The first rows in a random order: neighbours in the data must not end up held out together."""
    count = min(len(rows), most)
    order = np.random.default_rng(seed).permutation(count)
    writer = RowWriter(folder, rows.length, padding)
    for start in range(0, count, 1024):
        part = order[start : start + 1024]
        writer.copy_rows(rows.input_ids[part], rows.position_ids[part], rows.mask[part])
    writer.finish()


def _sample(plan: HealingPlan, work: RunFolder, place: Place, teacher: Callable[[], Teacher], report: Report) -> None:
    """Shards of the teacher's text, each process its own, then the rows from them."""
    wanted = plan.sampled_rows(place.world) + plan.held_out_rows()
    cache = plan.options.sample_cache
    store = SampleStore(
        work.path("samples") if cache is None else Path(cache),
        teacher=plan.teacher.fingerprint(),
        length=plan.seq_length,
        seed=plan.options.seed,
    )
    shards = math.ceil(wanted / SHARD_ROWS)
    missing = store.missing(shards)
    if missing:
        mine = missing[place.rank :: place.world]
        already = (shards - len(missing)) / shards
        model = teacher().model
        store.fill(model, mine, lambda done: report("sampling text", already + (1 - already) * done / len(mine), {}))
    place.barrier()
    if place.is_main:
        writer = RowWriter(work.path("rows"), plan.seq_length, 0)
        for ids, counts in _first_rows(store, wanted):
            learned = torch.zeros_like(counts)
            learned[:, :-1] = counts[:, 1:]
            writer.add_rows(ids.numpy(), learned.numpy())
        writer.finish()


def _first_rows(store: SampleStore, wanted: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number in range(math.ceil(wanted / SHARD_ROWS)):
        ids, counts = store.read(number)
        yield ids[: wanted - number * SHARD_ROWS], counts[: wanted - number * SHARD_ROWS]

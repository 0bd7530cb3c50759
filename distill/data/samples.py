"""Text sampled from the teacher, in numbered shards on disk: seeded one by one, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from xeco_convert.calibration.sampling import sample_rows
from xeco_convert.files import write_whole

SHARD_ROWS = 64


class SampleStore:
    """Shards of SHARD_ROWS rows of `length` tokens each, in a folder that belongs to one teacher, length and seed.

    Every shard has a seed of its own and depends on nothing before it. Several processes may fill one store, each its own
    shards, and other runs may find them there.
    """

    def __init__(self, cache: Path, *, teacher: str, length: int, seed: int) -> None:
        facts = json.dumps({"teacher": teacher, "length": length, "seed": seed, "rows": SHARD_ROWS}, sort_keys=True)
        self.folder = cache / hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "what.json").write_text(facts + "\n", encoding="utf-8")
        self._length = length
        self._seed = seed

    def missing(self, num_shards: int) -> list[int]:
        """Which of the first shards are not there yet."""
        return [number for number in range(num_shards) if not self._file(number).is_file()]

    def fill(self, model: Any, shards: list[int], on_progress: Callable[[float], None]) -> None:
        """Sample these shards, telling how many are done. Each is there whole or not at all."""
        for done, number in enumerate(shards):
            tell = lambda share, done=done: on_progress(done + share)  # noqa: E731
            ids, counts = sample_rows(
                model, SHARD_ROWS, self._length, self._shard_seed(number), SHARD_ROWS, on_progress=tell
            )
            shard = {"ids": ids.to(torch.int32), "counts": counts}
            write_whole(self._file(number), partial(save_file, shard))

    def read(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [r, length] int32 of a shard, and which of them count."""
        data = load_file(self._file(number))
        return data["ids"], data["counts"]

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def _shard_seed(self, number: int) -> int:
        """Neighbouring seeds must not give neighbouring streams: shard 1 of seed 0 is not shard 0 of seed 1."""
        digest = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

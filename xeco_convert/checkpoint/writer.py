"""Writes a checkpoint shard by shard in bounded memory, into a temporary sibling that is renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from xeco_convert.checkpoint.dtypes import DTYPE_BYTES, DTYPE_NAMES
from xeco_convert.checkpoint.index import INDEX_FILE, SINGLE_FILE, TensorHeader
from xeco_convert.errors import OutputError


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """Where a planned tensor goes: its header, file and first byte."""

    header: TensorHeader
    file: str
    offset: int


class CheckpointWriter:
    """A context: inside it tensors and files go to a temporary folder beside `output`; leaving it without error renames
    that folder to `output`, leaving it with one (Ctrl-C included) removes it.

    The headers of all tensors are given beforehand, so that every file has its final layout from the start and a tensor
    can be written, and forgotten, as soon as it exists.
    """

    def __init__(self, output: Path, headers: Sequence[TensorHeader], *, max_shard_bytes: int, overwrite: bool) -> None:
        self._output = output.absolute()
        self._headers = headers
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._slots: dict[str, _Slot] = {}
        self._written: set[str] = set()
        self._streams: dict[str, BinaryIO] = {}
        self._folder: Path | None = None
        self._missing_parents: list[Path] = []

    @property
    def folder(self) -> Path:
        """The temporary folder, for the files beside the weights."""
        assert self._folder is not None, "the writer is used inside its context"
        return self._folder

    def __enter__(self) -> CheckpointWriter:
        parent = self._output.parent
        self._missing_parents = [folder for folder in self._output.parents if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._output.name}.", dir=parent))
            self._folder.chmod(
                0o777 & ~_umask()
            )  # mkdtemp makes private folders; a checkpoint is as shared as its parent
            self._check_space()
            self._lay_out()
        except BaseException as error:
            self._discard()
            raise self._explained(error) from (None if isinstance(error, OSError) else error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
            elif isinstance(error, OSError):
                raise self._explained(error) from None
        except OSError as failure:
            raise self._explained(failure) from None
        finally:
            self._discard()

    def write(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write one planned tensor, given whole or in consecutive pieces along its first dimension.

        Raises `ValueError` where dtype or size differ from the plan: a fault of the program, not of its user.
        """
        slot = self._slots[name]
        stream = self._streams[slot.file]
        stream.seek(slot.offset)
        num_bytes = 0
        for chunk in chunks:
            if DTYPE_NAMES[chunk.dtype] != slot.header.dtype:
                raise ValueError(f"{name}: planned as {slot.header.dtype}, given as {chunk.dtype}")
            data = chunk.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(data.data)
            num_bytes += data.nbytes
        if num_bytes != slot.header.num_bytes:
            raise ValueError(f"{name}: planned {slot.header.num_bytes} bytes, given {num_bytes}")
        self._written.add(name)

    def flush(self) -> None:
        """Let others read what was written so far."""
        for stream in self._streams.values():
            stream.flush()

    def write_text(self, relative: str, text: str) -> None:
        """Write a text file beside the weights."""
        (self.folder / relative).write_text(text, encoding="utf-8")

    def copy_file(self, source: Path, relative: Path) -> None:
        """Copy a file of the source beside the weights, its bytes unchanged."""
        target = self.folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def _check_space(self) -> None:
        needed, free = sum(header.num_bytes for header in self._headers), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self._output}: the weights need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on that disk; "
                "free some space or choose another folder."
            )

    def _lay_out(self) -> None:
        """Assign each tensor a file and an offset, and write all headers."""
        shards = _split(self._headers, self._max_shard_bytes)
        for number, unordered in enumerate(shards, start=1):
            # Wide dtypes first, so that every tensor starts at a multiple of its own item size, as mapped readers need.
            shard = sorted(unordered, key=lambda header: -DTYPE_BYTES[header.dtype])
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            frame, offsets = _frame(shard)
            stream = (self.folder / file).open("wb")
            self._streams[file] = stream
            stream.write(frame)
            for header, offset in zip(shard, offsets, strict=True):
                self._slots[header.name] = _Slot(header=header, file=file, offset=len(frame) + offset)
        if len(shards) > 1:
            weight_map = {name: slot.file for name, slot in sorted(self._slots.items())}
            index = {
                "metadata": {"total_size": sum(header.num_bytes for header in self._headers)},
                "weight_map": weight_map,
            }
            self.write_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def _finish(self) -> None:
        """Make everything durable, then put the folder in its place, keeping the old one until the new one stands."""
        missing = sorted(set(self._slots) - self._written)
        if missing:
            raise ValueError(f"planned but never written: {missing[:3]} ({len(missing)} in all)")
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        if self._output.exists() and not self._overwrite and any(self._output.iterdir()):
            raise OutputError(
                f"{self._output} appeared while the conversion ran; it was left as it is. Choose another OUT."
            )
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Rename the folder to `output`. What was there goes only when the new one stands, and comes back otherwise."""
        aside = self.folder.with_name(f"{self.folder.name}.replaced")
        try:
            if self._output.exists():
                self._output.rename(aside)
            self.folder.rename(self._output)
            self._folder = None
        finally:  # also for Ctrl-C between the two
            if aside.exists() and self._output.exists():
                shutil.rmtree(aside, ignore_errors=True)
            elif aside.exists():
                aside.rename(self._output)

    def _discard(self) -> None:
        for stream in self._streams.values():
            try:
                stream.close()
            except OSError:  # a full disk fails the flush at closing once more; the first failure has been told
                pass
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for parent in self._missing_parents:  # made for the output; where that stands they are not empty, and stay
            with suppress(OSError):
                parent.rmdir()

    def _explained(self, error: BaseException) -> BaseException:
        """An operating system's error in words of the output; any other as it is."""
        if not isinstance(error, OSError):
            return error
        reason = error.strerror or str(error)
        return OutputError(
            f"{self._output}: cannot be written ({reason}); nothing was left there. Check the disk and its permissions."
        )


def _split(headers: Sequence[TensorHeader], max_shard_bytes: int) -> list[list[TensorHeader]]:
    """Consecutive tensors in files of at most `max_shard_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[TensorHeader]] = [[]]
    filled = 0
    for header in headers:
        if shards[-1] and filled + header.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(header)
        filled += header.num_bytes
    return shards


def _frame(shard: Sequence[TensorHeader]) -> tuple[bytes, list[int]]:
    """Bytes before the data of a safetensors file, and the offset of each tensor behind them (safetensors format, v0.4)."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: list[int] = []
    end = 0
    for header in shard:
        offsets.append(end)
        end += header.num_bytes
        entries[header.name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [offsets[-1], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text, offsets


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

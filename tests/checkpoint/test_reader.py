"""Tensors are read whole or in slices, in memory of their own, and refused where they are not finite."""

from pathlib import Path

import pytest
import torch
from builders import write_json
from safetensors.torch import save_file

import xeco_convert.checkpoint.reader as reader_module
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(35.0).view(7, 5),
    "vector": torch.arange(129.0).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "numbers": torch.arange(6).view(2, 3),
    "deep": torch.arange(24.0, dtype=torch.float16).view(2, 3, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {})
    return tmp_path


@pytest.fixture
def reader(folder: Path) -> TensorReader:
    return TensorReader(CheckpointIndex.open(folder))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("chunk_bytes", [1, 40, 2**26])
def test_pieces_make_up_the_tensor(
    reader: TensorReader, name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", chunk_bytes)
    chunks = list(reader.read_chunks(name))
    whole = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    assert whole.dtype == TENSORS[name].dtype
    assert torch.equal(whole, TENSORS[name])
    row_bytes = TENSORS[name].nbytes // max(1, TENSORS[name].shape[0]) if TENSORS[name].dim() else 0
    assert all(chunk.nbytes <= max(chunk_bytes, row_bytes, 8) for chunk in chunks)


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_a_tensor_is_read_in_the_dtype_that_is_asked_for(
    reader: TensorReader, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", chunk_bytes)
    found = reader.read("vector", dtype=torch.float64)
    assert torch.equal(found, TENSORS["vector"].double())


def test_what_was_read_does_not_depend_on_the_file_any_more(folder: Path, reader: TensorReader) -> None:
    found = [reader.read("matrix", dtype=torch.float32), next(iter(reader.read_chunks("matrix")))]
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-600, 2)
        stream.write(b"\xff" * 600)
    for tensor in found:
        assert torch.equal(tensor, TENSORS["matrix"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [8, 2**26])
def test_values_that_are_not_finite_are_refused(
    folder: Path, value: float, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", chunk_bytes)
    tensor = torch.ones(6, 4, dtype=dtype)
    tensor[5, 3] = value
    save_file({"x": tensor}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: x holds NaN or infinite values, expected finite weights"
    ):
        TensorReader(CheckpointIndex.open(folder)).read("x", dtype=torch.float32)


def test_a_file_that_changed_after_the_index_was_made_is_told(folder: Path, reader: TensorReader) -> None:
    (folder / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="matrix could not be read"):
        reader.read("matrix", dtype=torch.float32)

"""The writer: layout, shards and bytes; nothing is left of what fails, and an old output stays until the new one stands."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from xeco_convert.checkpoint import CheckpointWriter, TensorHeader
from xeco_convert.errors import OutputError

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "a": torch.randn(3, 5, generator=GENERATOR).to(torch.bfloat16),
    "b": torch.randn(7, generator=GENERATOR),
    "c": torch.randn(1, generator=GENERATOR).to(torch.float16),
    "d": torch.arange(3),
    "e": torch.tensor([True, False, True]),
    "f": torch.zeros(0, 4),
    "g": torch.tensor(1.5, dtype=torch.float64),
}
NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float64: "F64",
}


def headers_of(tensors: dict[str, torch.Tensor]) -> list[TensorHeader]:
    return [TensorHeader(name=n, dtype=NAMES[t.dtype], shape=tuple(t.shape)) for n, t in tensors.items()]


def writer_for(
    output: Path, tensors: dict[str, torch.Tensor] = TENSORS, size: int = 10**9, overwrite: bool = False
) -> CheckpointWriter:
    return CheckpointWriter(output, headers_of(tensors), max_shard_bytes=size, overwrite=overwrite)


def write_all(
    output: Path, tensors: dict[str, torch.Tensor] = TENSORS, size: int = 10**9, overwrite: bool = False
) -> None:
    with writer_for(output, tensors, size, overwrite) as writer:
        for name in reversed(tensors):  # any order will do
            writer.write(name, [tensors[name]])
        writer.write_text("config.json", "{}")


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_what_is_written_is_read_back(tmp_path: Path, size: int) -> None:
    write_all(tmp_path / "out", size=size)
    found = loaded(tmp_path / "out")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_each_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path, size: int) -> None:
    write_all(tmp_path / "out", size=size)
    for file in (tmp_path / "out").glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        assert start % 8 == 0
        entries = json.loads(data[8:start])
        assert entries.pop("__metadata__") == {"format": "pt"}
        for name, entry in entries.items():
            assert (start + entry["data_offsets"][0]) % TENSORS[name].itemsize == 0
        assert max(entry["data_offsets"][1] for entry in entries.values()) == len(data) - start


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write_all(tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"model.safetensors", "config.json"}


def test_shards_stay_below_the_size_and_are_indexed(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(12)}
    write_all(tmp_path / "out", tensors, size=64)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            names = list(handle.keys())
            assert handle.metadata() == {"format": "pt"}
        assert all(index["weight_map"][name] == file for name in names)
        assert sum(tensors[name].nbytes for name in names) <= 64


def test_a_tensor_larger_than_the_size_gets_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {"small": torch.zeros(1), "large": torch.zeros(100), "last": torch.zeros(1)}
    write_all(tmp_path / "out", tensors, size=16)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [list(load_file(file)) for file in files] == [["small"], ["large"], ["last"]]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_all(tmp_path / name, size=40)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_tensor_may_come_in_pieces_and_as_a_view(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(12, 5)
    tensors = {"x": whole, "y": whole.T}
    with writer_for(tmp_path / "out", tensors) as writer:
        writer.write("x", whole.split([1, 7, 4]))
        writer.write("y", [whole.T])
    assert torch.equal(loaded(tmp_path / "out")["x"], whole) and torch.equal(loaded(tmp_path / "out")["y"], whole.T)


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([torch.zeros(3)], "planned 28 bytes, given 12"),
        ([torch.zeros(4), torch.zeros(4)], "planned 28 bytes, given 32"),
        ([], "planned 28 bytes, given 0"),
        ([torch.zeros(7, dtype=torch.float64)], "planned as F32, given as torch.float64"),
    ],
)
def test_tensors_that_differ_from_their_plan_raise(tmp_path: Path, pieces: list[torch.Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), writer_for(tmp_path / "out", {"b": TENSORS["b"]}) as writer:
        writer.write("b", pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_never_written_raises(tmp_path: Path) -> None:
    def run() -> None:
        with writer_for(tmp_path / "out") as writer:
            for name in set(TENSORS) - {"b"}:
                writer.write(name, [TENSORS[name]])

    with pytest.raises(ValueError, match=r"never written.*'b'"):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no"), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_what_fails(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    expected = error if isinstance(error, type) else type(error)
    output = tmp_path / "deep" / "er" / "out"
    if overwrite:
        write_all(output)
    before = contents(tmp_path)

    def run() -> None:
        with writer_for(output, overwrite=overwrite) as writer:
            writer.write("a", [TENSORS["a"]])
            raise error

    with pytest.raises(expected):
        run()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["deep"] if overwrite else [])
    if overwrite:
        assert [path.name for path in output.parent.iterdir()] == ["out"]


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "flush", "fsync", "rename", "write_text", "mkdir"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    write_all(output)
    before = contents(tmp_path)

    def run() -> None:
        with writer_for(output, overwrite=True) as writer:
            if call in ("write", "flush"):
                stream = next(iter(writer._streams.values()))

                class Full:
                    def __getattr__(self, name: str) -> object:
                        return full_disk if name == call else getattr(stream, name)

                writer._streams = dict.fromkeys(writer._streams, Full())
            for name, tensor in TENSORS.items():
                writer.write(name, [tensor])
            if call == "fsync":
                monkeypatch.setattr(os, "fsync", full_disk)
            if call == "rename":
                monkeypatch.setattr(Path, "rename", full_disk)
            if call == "write_text":
                monkeypatch.setattr(Path, "write_text", full_disk)
            writer.write_text("config.json", "{}")

    if call == "mkdir":
        monkeypatch.setattr("tempfile.mkdtemp", full_disk)
    with pytest.raises(
        OutputError, match=r"out: cannot be written \(No space left on device\); nothing was left there"
    ):
        run()
    monkeypatch.undo()
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
def test_the_old_output_comes_back_when_the_exchange_fails(
    tmp_path: Path, failing: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First rename: the old output aside; second: the new one in its place."""
    output = tmp_path / "out"
    write_all(output)
    before, rename, calls = contents(tmp_path), Path.rename, []

    def failing_rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_all(output, {"b": torch.zeros(2)}, overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_all(output)
    (output / "stale.safetensors").write_text("old")
    write_all(output, {"b": torch.zeros(2)}, overwrite=True)
    assert set(contents(output)) == {"model.safetensors", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_all(tmp_path / "out")
    assert set(loaded(tmp_path / "out")) == set(TENSORS)


def test_an_output_that_appears_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def run() -> None:
        with writer_for(output) as writer:
            for name, tensor in TENSORS.items():
                writer.write(name, [tensor])
            output.mkdir()
            (output / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="appeared while the conversion ran"):
        run()
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 10, "used": 0, "free": 10})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"the weights need .* GB, 0\.00 GB are free"), writer_for(tmp_path / "out"):
        pytest.fail("the writer opened")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_all(tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_copied_files_keep_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_bytes(b"a\r\n\xff")
    with writer_for(tmp_path / "out", {}) as writer:
        writer.copy_file(tmp_path / "LICENSE", Path("sub/LICENSE"))
    assert (tmp_path / "out" / "sub" / "LICENSE").read_bytes() == b"a\r\n\xff"

"""Runs the command in this process and holds it to what every refusal must be: one sentence, a code, nothing written."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import build_checkpoint

from xeco_convert.cli import main


@dataclass(frozen=True)
class Refusal:
    """What a refused command said on stderr."""

    sentence: str


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, with its bytes and time of change."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good source that a test may damage."""
    return build_checkpoint(tmp_path / "in", "llama", tokenizer=True)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good source in three shards that a test may damage."""
    return build_checkpoint(tmp_path / "in", "qwen2", num_shards=3)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command takes signals for itself; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    """refuse(code, arguments...): the command's refusal. Checks that it left every file as it was, and added none."""

    def run(code: int, *arguments: object) -> Refusal:
        before, listed = snapshot(tmp_path), names(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        assert done.value.code == code, output.err
        assert snapshot(tmp_path) == before and names(tmp_path) == listed
        assert output.out == "" and "Traceback" not in output.err
        sentence = output.err.strip().splitlines()[-1]
        assert sentence.startswith(("xeco-convert: ", "xeco-convert inspect: ", "Error: "))
        return Refusal(sentence)

    return run

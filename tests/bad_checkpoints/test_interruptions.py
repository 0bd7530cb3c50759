"""What stops a conversion in the middle: signals, full disks, folders that cannot be written. Nothing is left behind."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_checkpoint, random_ids, source_config, write_json, write_weights
from fresh import Program, start_command
from safetensors.torch import load_file

import xeco_convert
from xeco_convert.checkpoint import TensorReader
from xeco_convert.checkpoint.writer import CheckpointWriter
from xeco_convert.cli import main
from xeco_convert.errors import CheckpointError
from xeco_convert.pretrained import read_config
from xeco_convert.source import build_skeleton

Refuse = Callable[..., Any]
PAPER = ("--init", "paper", "--rank", "12")
COMMAND = Path(sys.executable).parent / "xeco-convert"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose conversion takes seconds: 16 layers of hidden_size 512."""
    folder = tmp_path_factory.mktemp("slow") / "in"
    folder.mkdir()
    sizes = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_hidden_layers": 16,
    }
    config = source_config("llama", **sizes, intermediate_size=8)
    generator = torch.Generator().manual_seed(0)
    state = build_skeleton(read_config(config)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_json(folder / "config.json", config)
    write_weights(folder, {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()})
    return folder


@pytest.fixture
def interrupted(slow_source: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Starts the command, sends it a signal as soon as its temporary folder is there, and waits for its end. `anew`: in a new
    interpreter, not a forked one (fresh.py)."""

    def run(number: signal.Signals, *options: str, anew: bool = False) -> subprocess.CompletedProcess[str]:
        command = [str(COMMAND), str(slow_source), str(tmp_path / "out"), *PAPER, *options]
        process: subprocess.Popen[str] | Program
        if anew:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        else:
            process = start_command("xeco-convert", *command[1:])
        tick = threading.Event()
        while process.poll() is None and not any(tmp_path.glob(".out.*/*.safetensors")):
            tick.wait(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing(
    interrupted: Callable[..., subprocess.CompletedProcess[str]], number: signal.Signals, tmp_path: Path
) -> None:
    done = interrupted(number, anew=number is signal.SIGINT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "xeco-convert: interrupted; nothing was written."
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


LAYERS_DONE = "; what was finished is kept in {work}, and the same command continues from there."
NO_WORK_FOLDER = ". With --work-dir FOLDER finished layers are kept, and the same command goes on from them."
TEXT = ("--calibration", "{tokens}", "--calibration-tokens", "1024")  # sampling it would take longer than all else
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "convert": (("{source}", "{out}", "--rank", "12", *TEXT), "interrupted; nothing was written" + NO_WORK_FOLDER),
    "convert with a folder": (
        ("{source}", "{out}", "--rank", "12", *TEXT, "--work-dir", "{work}"),
        "interrupted; nothing was written" + LAYERS_DONE,
    ),
    "sweep": (("sweep", "{source}", "--kv-sizes", "50", *TEXT), "interrupted; nothing was written" + NO_WORK_FOLDER),
    "sweep with a folder": (
        ("sweep", "{source}", "--kv-sizes", "50", *TEXT, "--work-dir", "{work}"),
        "interrupted; nothing was written" + LAYERS_DONE,
    ),
    "export": (("export", "{converted}", "{out}"), "interrupted; nothing was written."),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_kept_and_how_to_go_on(
    command: str, number: signal.Signals, source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two signals, as `timeout` and torchrun send them: the second does not disturb what the first makes the command do."""

    def read(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TensorReader, "read", read)
    monkeypatch.setattr("xeco_convert.export.pipeline._Export._write_weights", read)
    places = {"source": source, "converted": converted, "out": tmp_path / "out", "work": tmp_path / "work"}
    places["tokens"] = tmp_path / "tokens.json"
    write_json(places["tokens"], random_ids(40, 64).tolist())
    arguments, sentence = COMMANDS[command]
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**places) for argument in arguments])
    name = f"xeco-convert {arguments[0]}" if arguments[0] in ("sweep", "export") else "xeco-convert"
    assert stopped.value.code == 1
    assert said.getvalue().splitlines()[-1] == f"{name}: {sentence.format(**places)}"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert ((tmp_path / "work").exists()) is ("--work-dir" in arguments)


def test_a_signal_behind_the_work_does_not_deny_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xeco_convert.cli.convert.show_report", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        main([str(source), str(tmp_path / "out"), *PAPER])
    assert stopped.value.code == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"xeco-convert: interrupted; {tmp_path / 'out'} was written whole, only the report was not."
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "calibration text"), (signal.SIGINT, "layer 2 of 3"), (signal.SIGTERM, "layer 3 of 3")],
)
def test_a_real_process_stops_at_any_moment_and_says_what_is_kept(
    number: signal.Signals, moment: str, source: Path, tmp_path: Path
) -> None:
    """Started as Slurm and CI do it, without a terminal; the progress in the log says when to stop it."""
    arguments = [str(source), str(tmp_path / "out"), "--rank", "8", "--calibration-tokens", "1024"]
    arguments += ["--refine", "--refine-steps", "120", "--work-dir", str(tmp_path / "work")]
    log = tmp_path / "log"
    process = start_command("xeco-convert", *arguments, log=log)
    tick = threading.Event()
    while process.poll() is None and moment not in log.read_text():
        tick.wait(0.005)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(timeout=120) == 1
    lines = log.read_text().splitlines()
    assert "Traceback" not in log.read_text() and "\r" not in log.read_text()
    assert lines[-1] == "xeco-convert: interrupted; nothing was written" + LAYERS_DONE.format(work=tmp_path / "work")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    kept = {file.name for file in (tmp_path / "work").glob("*.pt")}
    assert ("windows.pt" in kept) is (moment != "calibration text")
    assert ("factors-0.pt" in kept) is moment.startswith("layer")


@pytest.mark.slow
def test_a_signal_in_the_middle_keeps_the_old_output(
    interrupted: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    assert interrupted(signal.SIGTERM, "--overwrite", "--quiet").returncode == 1
    assert files(tmp_path) == {"out/old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "raised", [ValueError("could not determine the shape"), CheckpointError("could not be read"), KeyboardInterrupt()]
)
def test_an_interrupt_that_a_library_turned_into_its_own_error_is_still_one(
    raised: BaseException, source: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors does with an interrupt while it makes a tensor."""

    def read(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise raised from None

    monkeypatch.setattr(TensorReader, "read", read)
    assert (
        refuse(1, source, source.parent / "out", *PAPER, "--quiet").sentence
        == "xeco-convert: interrupted; nothing was written."
    )


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["write", "copy_file", "write_text", "_finish", "_lay_out"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_full_disk_is_told(
    source: Path, refuse: Refuse, method: str, overwrite: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        (source.parent / "out").mkdir()
        (source.parent / "out" / "old.txt").write_text("old")
    monkeypatch.setattr(CheckpointWriter, method, full_disk)
    sentence = refuse(1, source, source.parent / "out", *PAPER, "--quiet", *overwrite).sentence
    assert "out: cannot be written (No space left on device); nothing was left there" in sentence


def test_too_little_space_is_told_with_both_sizes(
    source: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    sentence = refuse(1, source, source.parent / "out", *PAPER, "--quiet").sentence
    assert "the weights need 0.00 GB, 0.00 GB are free on that disk" in sentence


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_disk_that_is_really_full_is_told(
    tmp_path: Path, small_disk: Path, refuse: Refuse, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the space that it says is free; and by the failing write, where another program takes that in the meantime."""
    source = build_checkpoint(tmp_path / "in", "llama", vocab_size=400)
    if not announced:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
    sentence = refuse(1, source, small_disk / "out", *PAPER, "--quiet").sentence
    assert ("are free on that disk" if announced else "No space left on device") in sentence


def test_a_file_in_the_way_is_told(source: Path, refuse: Refuse) -> None:
    (source.parent / "file").write_text("x")
    for output in (source.parent / "file" / "out", source.parent / "file" / "deep" / "out"):
        sentence = refuse(1, source, output, *PAPER, "--quiet").sentence
        assert "cannot be written" in sentence and "file is not a folder" in sentence


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter (pytest's own are private), with a source in it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for file in build_checkpoint(Path(name) / "in", "llama").iterdir():
            file.chmod(0o644)
        yield Path(name)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read and write anything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def refusal_without_privileges(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr of a command that fails with exit code 1."""
    import xeco_convert.conversion  # noqa: F401  what nobody may not be allowed to import

    capfd.readouterr()
    with without_privileges(), pytest.raises(SystemExit) as done:
        main([*arguments, *PAPER, "--quiet"])
    sentence = capfd.readouterr().err.strip()
    assert done.value.code == 1 and len(sentence.splitlines()) == 1, sentence
    return sentence


@pytest.mark.parametrize("mode", [0o555, 0o000])
@pytest.mark.parametrize("place", ["out", "new/out"])
def test_an_output_without_permission_is_told(
    open_folder: Path, mode: int, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    locked = open_folder / "locked"
    locked.mkdir()
    locked.chmod(mode)
    sentence = refusal_without_privileges(capfd, str(open_folder / "in"), str(locked / place))
    locked.chmod(0o755)
    assert f"{locked / place}: cannot be written (Permission denied)" in sentence
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_a_source_without_permission_is_told(open_folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (open_folder / "in" / name).chmod(0o000)
    (open_folder / "free").mkdir()
    (open_folder / "free").chmod(0o777)
    sentence = refusal_without_privileges(capfd, str(open_folder / "in"), str(open_folder / "free" / "out"))
    (open_folder / "in").chmod(0o755)
    assert str(open_folder / "in") in sentence and "Permission denied" in sentence
    assert list((open_folder / "free").iterdir()) == []


def test_a_source_that_was_read_is_as_it_was(source: Path, tmp_path: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    xeco_convert.convert(source, tmp_path / "out", init="paper", rank=12)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    assert load_file(tmp_path / "out" / "model.safetensors")

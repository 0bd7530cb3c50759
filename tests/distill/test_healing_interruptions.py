"""Runs that end before their time: killed at any moment, stopped by the user, out of disk, out of numbers. Nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Program, start_command
from runs import quick

from xeco_convert.errors import OptionError
from xeco_distill.callbacks import StopRequests
from xeco_distill.errors import HealingError
from xeco_distill.pipeline import heal
from xeco_distill.trainer import COMPLETE, DistillationTrainer

pytestmark = pytest.mark.slow

Files = Callable[[Path], dict[str, bytes]]
RUN = (
    "--stages",
    "kl",
    "--seq-length",
    "64",
    "--batch-size",
    "2",
    "--device",
    "cpu",
    "--quiet",
    "--held-out-tokens",
    "256",
)
LONG = (*RUN, "--budget-tokens", "4096", "--trainer", "save_steps=7", "--trainer", "eval_steps=1000")  # 32 steps


def start(folder: Path, *options: str) -> Program:
    return start_command("xeco-distill", folder, *options)


def wait_for(process: Program, what: Callable[[], bool]) -> None:
    tick = threading.Event()
    while process.poll() is None and not what():
        tick.wait(0.005)


def test_killed_twice_in_the_middle_it_ends_bit_for_bit_the_same(out: Path, tmp_path: Path, text: Path) -> None:
    data = ("--data", str(text))
    other = tmp_path / "killed"
    shutil.copytree(out, other, copy_function=shutil.copy2)
    assert start(out, *LONG, *data).wait(timeout=280) == 0
    work = other.with_name("killed.healing")
    for step in (7, 21):
        process = start(other, *LONG, *data)
        wait_for(process, lambda step=step: (work / "kl" / f"checkpoint-{step}" / COMPLETE).exists())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and (other / "model.safetensors").is_file()
    assert start(other, *LONG, *data).wait(timeout=280) == 0
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_then_ends_and_the_same_command_goes_on(
    out: Path, files: Files, text: Path, number: signal.Signals
) -> None:
    before, work = files(out), out.with_name("out.healing")
    options = (*RUN, "--budget-tokens", "128000", "--data", str(text), "--trainer", "save_steps=500")
    process = start(out, *options)
    wait_for(process, (work / "kl-steps.json").exists)
    wait_for(process, _after(2.0))
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "the same command continues" in error
    assert error.count("\n") == 1 and files(out) == before
    saved = list((work / "kl").glob(f"checkpoint-*/{COMPLETE}"))
    assert len(saved) == 1 and int(saved[0].parent.name.rpartition("-")[2]) % 500 != 0


def test_before_training_too_the_signal_says_where_the_run_is_kept(out: Path, files: Files, text: Path) -> None:
    """Without a terminal: the log says how far it is; two signals, as `timeout` and torchrun send them."""
    before, work = files(out), out.with_name("out.healing")
    options = [option for option in RUN if option != "--quiet"]
    process = start(out, *options, "--budget-tokens", "128000", "--data", str(text))
    wait_for(process, (work / "rows" / "rows.json").exists)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in error and "\r" not in error
    assert "  ETA " in error and "reading text" in error
    last = error.splitlines()[-1]
    assert f"what was done is kept in {work}, and the same command continues the run" in last or (
        f"the state is kept in {work}" in last  # training had begun
    )
    assert files(out) == before and work.is_dir()


def test_workers_that_the_same_signal_ended_are_no_failure_of_their_own() -> None:
    """Slurm and a terminal's Ctrl-C tell every process of a group: a loader's dead worker is an error in the trainer."""
    stop = StopRequests()

    def train() -> None:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    with pytest.raises(KeyboardInterrupt):
        train()
    with pytest.raises(HealingError, match="could not be saved"), stop.listening():
        raise HealingError("the state could not be saved")
    with pytest.raises(RuntimeError, match="of its own"), StopRequests().listening():
        raise RuntimeError("a failure of its own")


def test_the_same_signal_twice_in_a_second_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("xeco_distill.callbacks.time.monotonic", lambda: now[0])
    with StopRequests().listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):  # a second wish ends at once
            os.kill(os.getpid(), signal.SIGINT)


def _after(seconds: float) -> Callable[[], bool]:
    import time

    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_an_unfinished_run_with_other_options_is_refused(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_at(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        heal(out, quick(data=str(text)))
    monkeypatch.undo()
    with pytest.raises(OptionError, match="holds an unfinished run with other options"):
        heal(out, quick(data=str(text), learning_rate=1e-3))
    report = heal(out, quick(data=str(text), learning_rate=1e-3, restart=True))
    assert report.stages["kl"]["learning_rate"] == 1e-3


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = DistillationTrainer.compute_loss

    def compute(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise RuntimeError("stopped by the test")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute)


def test_a_checkpoint_that_was_cut_off_is_not_used(out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_at(monkeypatch, 5)
    with pytest.raises(RuntimeError):
        heal(out, quick(data=str(text)))
    monkeypatch.undo()
    folder = out.with_name("out.healing") / "kl"
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / COMPLETE).unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    assert heal(out, quick(data=str(text))).stages["kl"]["steps"] == 16


def test_a_loss_that_is_no_number_stops_and_says_where_the_last_good_state_is(
    out: Path, files: Files, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(out)
    original = DistillationTrainer.training_step

    def poison(self: DistillationTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", poison)
    with pytest.raises(HealingError, match=r"the loss is nan at step 6; .* kept in .*out.healing/kl/checkpoint-4"):
        heal(out, quick(data=str(text)))
    assert files(out) == before


def test_weights_that_are_no_numbers_are_never_saved(out: Path, text: Path) -> None:
    with pytest.raises(HealingError, match=r"at step|after step") as error:
        heal(out, quick(data=str(text), learning_rate=1e38, trainer={"max_grad_norm": 0, "warmup_steps": 0}))
    assert "Lower --learning-rate" in str(error.value)


@pytest.mark.parametrize("moment", ["checkpoint", "result"])
def test_a_full_disk_loses_nothing(
    out: Path, files: Files, text: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = files(out)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if moment == "checkpoint":
        original = torch.save

        def save(data: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-6" in str(file):
                raise full
            original(data, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(HealingError, match=r"could not be saved \(No space left on device\).*checkpoint-4"):
            heal(out, quick(data=str(text)))
    else:
        import xeco_distill.publish

        def copy_file(*_arguments: Any) -> None:
            raise full

        monkeypatch.setattr(xeco_distill.publish.CheckpointWriter, "copy_file", copy_file)
        with pytest.raises(Exception, match="No space left on device"):
            heal(out, quick(data=str(text)))
    monkeypatch.undo()
    assert files(out) == before
    report = heal(out, quick(data=str(text)))  # there is space again
    assert report.stages["kl"]["steps"] == 16 and report.after["kl"] < report.before["kl"]


def test_a_kill_between_the_two_renames_is_finished_by_the_next_run(out: Path, files: Files, text: Path) -> None:
    kept = out.with_name("out.before-healing")
    before = files(out)
    out.rename(kept)
    out.with_name("out.healing").mkdir()
    (out.with_name("out.healing") / "run.json").write_text('{"fingerprint": "of the run that was killed"}')
    heal(out, quick(data=str(text), keep_original=False, restart=True))
    assert files(out) != before and not kept.exists()  # taken back, then healed


def test_sampling_goes_on_where_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xeco_distill.data import samples

    monkeypatch.setattr(samples, "SHARD_ROWS", 8)
    monkeypatch.setattr("xeco_distill.data.preparation.SHARD_ROWS", 8)
    original, calls = samples.sample_rows, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == 2:
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append("shard")
        return original(*args, **kwargs)

    monkeypatch.setattr(samples, "sample_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        heal(out, quick())
    assert len(list(out.with_name("out.healing").rglob("shard-*.safetensors"))) == 2
    heal(out, quick())
    assert calls.count("shard") == 5  # 36 rows in shards of 8

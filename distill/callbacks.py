"""What watches a training run: the user's signals, the clock, and the progress on the terminal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xeco_convert.commandline.run import SAME_WISH_SECONDS
from xeco_convert.errors import XecoError

from .losses.loss import LOSSES

# (what, share of the stage done, figures to show)
Report = Callable[[str, float, dict[str, float]], None]


class StopRequests(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into: finish this step, save, end. A second one ends at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._requested = False
        self._last = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While training: signals are requests. Afterwards they are what they were."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._request)
        try:
            yield
        except Exception as error:
            if not self._requested or isinstance(error, XecoError):
                raise
            raise KeyboardInterrupt from error  # as of workers that the same signal ended
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested and now - self._last >= SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        self._requested, self._last = True, now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_named: Any) -> None:
        if args.world_size > 1:  # one process that was told must stop all of them
            flag = torch.tensor(float(self._requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self._requested = bool(flag.item())
        if self._requested and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class TimeLimit(TrainerCallback):
    """Stops after some seconds of training, those of earlier parts of the run included."""

    def __init__(self, seconds: float | None, spent: float) -> None:
        self._seconds = seconds
        self._before = spent
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return self._before + time.monotonic() - self._began

    def on_train_begin(self, *_arguments: Any, **_named: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_named: Any) -> None:
        late = self._seconds is not None and self.spent >= self._seconds
        if args.world_size > 1 and self._seconds is not None:
            flag = torch.tensor(float(late), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            late = bool(flag.item())
        if late:
            control.should_save = control.should_training_stop = True


_FIGURES = {"loss": "loss", "learning_rate": "lr", "eval_kl": "held-out KL", "rewards/margins": "margin"}


class ProgressReports(TrainerCallback):
    """Tells how far training is: tokens per second, loss, KL and learning rate."""

    def __init__(self, report: Report, tokens_per_step: int, stage: str) -> None:
        self._report = report
        self._tokens = tokens_per_step
        self._stage = stage
        self._figures: dict[str, float] = {}
        self._first: tuple[float, int] | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_arguments: Any, **_named: Any) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, state.global_step)
        elif now > self._first[0]:
            steps = state.global_step - self._first[1]
            self._figures["tokens/s"] = steps * self._tokens / (now - self._first[0])
        self._report(self._stage, state.global_step / max(1, state.max_steps), dict(self._figures))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_named: Any,
    ) -> None:
        names = _FIGURES | {entry.name.replace("-", "_"): entry.figure for entry in LOSSES}
        self._figures |= {names[key]: float(value) for key, value in (logs or {}).items() if key in names}

"""A loss is one class: this file adds one, with an option of its own, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import quick

from xeco_convert.errors import OptionError
from xeco_convert.settings import option, require
from xeco_distill.cli import main
from xeco_distill.loss_terms import terms_of
from xeco_distill.losses import LOSSES, Loss
from xeco_distill.options import DistillOptions
from xeco_distill.pipeline import heal

if TYPE_CHECKING:
    from torch import Tensor

    from xeco_distill.losses.chunked import Chunk, Slab


@dataclass(frozen=True, kw_only=True)
class Brier(Loss):
    """pull · ½ Σ (p_student − p_teacher)²: the Brier score against the teacher's probabilities."""

    name = "brier"
    figure = "Brier"

    pull: float = option("brier: factor of the score.", 1.0, metavar="F")

    def __post_init__(self) -> None:
        require(self.pull > 0, "--pull", "a positive number", self.pull)

    def losses(self, chunk: Chunk) -> Tensor:
        parts = [(slab.student_p - slab.teacher_p).square().sum(dim=1) for slab in chunk.slabs()]
        return self.pull * sum(parts[1:], parts[0]) / 2

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        # through the softmax: p · (d − Σ p d), with d = p_student − p_teacher
        parts = [(s.student_p * (s.student_p - s.teacher_p)).sum(dim=1) for s in slab.chunk.slabs()]
        mean = sum(parts[1:], parts[0])
        return self.pull * slab.student_p * (slab.student_p - slab.teacher_p - mean[:, None])


@pytest.fixture(autouse=True)
def brier() -> Iterator[None]:
    LOSSES.add(Brier)
    yield
    LOSSES.remove("brier")


def test_a_run_trains_on_it(out: Path, tmp_path: Path) -> None:
    options = quick(loss="brier", pull=3.0, stages="kl", output=str(tmp_path / "healed"))
    assert terms_of(options)[0].loss == Brier(pull=3.0)
    report = heal(out, options)
    history = [entry for entry in report.stages["kl"].get("history", []) if "brier" in entry]
    assert report.tokens > 0 and report.options["loss"] == "brier" and report.options["pull"] == 3.0
    assert report.after["kl"] < report.before["kl"]
    assert all(entry["brier"] >= 0 for entry in history)


def test_the_command_line_has_it_and_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "cross-entropy|brier]" in text and "--pull F" in text


def test_options_of_others_are_refused() -> None:
    with pytest.raises(OptionError, match=r"--pull: only with --loss brier; leave one of them out"):
        DistillOptions(pull=2.0)
    with pytest.raises(OptionError, match=r"--jsd-beta: only with --loss jsd; leave one of them out"):
        DistillOptions(loss="brier", jsd_beta=0.3)
    with pytest.raises(OptionError, match=r"--pull: expected a positive number, found 0"):
        DistillOptions(loss="brier", pull=0)
    with pytest.raises(OptionError, match="--top-k: only with --loss forward-kl"):
        DistillOptions(loss="brier", top_k=4)

"""A rank policy is one class: this file adds one, with an option of its own, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import xeco_convert
from xeco_convert.cli import main
from xeco_convert.errors import OptionError
from xeco_convert.ranks import RANK_POLICIES, CacheFacts, RankPolicy, Widths, WidthSurvey
from xeco_convert.settings import option, require


@dataclass(frozen=True, kw_only=True)
class TailPolicy(RankPolicy):
    """Keep singular values above a share of the largest one."""

    name = "tail"
    chosen_by: ClassVar[tuple[str, ...]] = ("tail",)

    tail: float = option("Keep singular values above this share of the largest.", metavar="SHARE", recorded=True)

    def __post_init__(self) -> None:
        require(0 < self.tail < 1, "--tail", "a share between 0 and 1", self.tail)

    def describe(self, facts: CacheFacts, widths: Widths, default: str) -> str:
        return f"kv_lora_rank of singular values above {self.tail} of the largest"

    def widths(self, survey: WidthSurvey, facts: CacheFacts, rope_dims: Sequence[int]) -> list[Widths]:
        ranks = [int(np.count_nonzero(spectrum > self.tail * spectrum[0])) for spectrum in survey.spectra()]
        return [Widths(kv_lora_rank=rank, qk_rope_head_dim=rope) for rank, rope in zip(ranks, rope_dims, strict=True)]


@pytest.fixture(autouse=True)
def tail() -> Iterator[None]:
    RANK_POLICIES.add(TailPolicy)
    yield
    RANK_POLICIES.remove("tail")


@pytest.mark.parametrize("init", ["calibrated", "paper"])
def test_it_chooses_the_widths_of_every_initialisation(init: str, llama: Path, tmp_path: Path) -> None:
    few = {"calibration_tokens": 64} if init == "calibrated" else {}
    report = xeco_convert.convert(llama, tmp_path / "out", tail=0.5, init=init, **few)
    ranks = [layer.kv_lora_rank or 0 for layer in report.layers]
    assert all(1 <= rank < 32 for rank in ranks)
    wide = xeco_convert.convert(llama, tmp_path / "wide", tail=0.01, init=init, **few)
    assert all((layer.kv_lora_rank or 0) > rank for layer, rank in zip(wide.layers, ranks, strict=True))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["conversion"]["options"]["tail"] == 0.5


def test_the_command_line_has_its_option(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code in (0, None)
    assert "--tail SHARE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([str(llama), "--init", "paper", "--tail", "0.5", "--dry-run"])
    assert end.value.code in (0, None)
    assert "layers get kv_lora_rank of singular values above 0.5 of the largest" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([str(llama), str(tmp_path / "out"), "--tail", "2"])
    assert end.value.code == 2
    assert "--tail: expected a share between 0 and 1, found 2.0" in capsys.readouterr().err


def test_it_is_refused_beside_another_policy() -> None:
    with pytest.raises(OptionError, match=r"--rank and --tail all set the rank: give one of them"):
        xeco_convert.ConvertOptions(rank=8, tail=0.5)
    with pytest.raises(OptionError, match=r"another of --energy, --kv-bytes-per-token, --tail"):
        xeco_convert.ConvertOptions()


def test_a_name_is_registered_once() -> None:
    RANK_POLICIES.add(TailPolicy)  # the same class again is no other
    with pytest.raises(ValueError, match="tail is registered twice"):
        RANK_POLICIES.add(type("Other", (TailPolicy,), {}))

"""An engine and a format are one entry each: this file adds one of both, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import xeco_convert
from xeco_convert.cli import main
from xeco_convert.export.engines import ENGINES, Engine, HeadWidths
from xeco_convert.export.formats import FORMATS
from xeco_convert.export.formats.deepseek_v3 import DeepseekV3

WIDE = Engine(
    name="wide",
    heads=(HeadWidths(nope=24, rope=16, v=24),),
    ranks=(20, 40),
    rope_reason="it knows one type",
    config={"n_group": 1},
)


class AnotherFormat(DeepseekV3):
    """A format of its own name and card, with the layout of another."""

    name = "deepseek-v3-again"
    about = "the same once more"
    card = "\n# {source} again, by {version} for {engine}\n"


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    ENGINES.add(WIDE)
    FORMATS.add(AnotherFormat)
    yield
    ENGINES.remove("wide")
    FORMATS.remove("deepseek-v3-again")


def command(*arguments: object) -> object:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.fixture
def portable(llama: Path, tmp_path: Path) -> Path:
    xeco_convert.convert(llama, tmp_path / "out", rank=16, rope_dim=4, portable=True, calibration_tokens=64)
    return tmp_path / "out"


def test_the_export_has_the_widths_of_the_engine_and_the_card_of_the_format(portable: Path, tmp_path: Path) -> None:
    assert command("export", portable, tmp_path / "stock", "--target", "wide", "--format", "deepseek-v3-again") in (
        0,
        None,
    )
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [config[name] for name in widths] == [20, 24, 16, 24]
    assert f"# out again, by {xeco_convert.__version__} for wide" in (tmp_path / "stock" / "README.md").read_text()


def test_the_command_line_names_them(portable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", "--help") in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    assert "transformers, vllm, vllm-cpu, sglang, llama.cpp, mlx or wide." in text
    assert "deepseek-v3, dense; deepseek-v3-again, the same once more." in text
    assert command("export", portable, tmp_path / "stock", "--target", "narrow") == 2
    assert "--target: expected one of transformers, vllm, vllm-cpu, sglang, llama.cpp, mlx, wide, found narrow" in (
        capsys.readouterr().err
    )

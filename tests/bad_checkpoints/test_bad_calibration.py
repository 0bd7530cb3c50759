"""Calibration that cannot be served: exit code, one sentence that says what to change; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import build_checkpoint

from xeco_convert.calibration import sampling
from xeco_convert.cli import main

Refuse = Callable[..., Any]

# code, arguments, what the sentence says. The model caches 32 numbers per token in each of 3 layers.
OPTIONS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "no KV": (2, "--kv-size 0", ("--kv-size: expected a share such as 25% or 0.25", "found '0'")),
    "more than all": (2, "--kv-size 150%", ("--kv-size: expected a share", "at most 100%", "found '150%'")),
    "no share": (2, "--kv-size abc", ("--kv-size: expected a share", "found 'abc'")),
    "no bytes": (2, "--kv-bytes-per-token 0", ("--kv-bytes-per-token: expected a positive whole number, found 0",)),
    "too small a share": (
        2,
        "--kv-size 5%",
        ("--kv-size: expected at least 12.5%", "48 bytes", "found 4.9%"),
    ),
    "too few bytes": (2, "--kv-bytes-per-token 40", ("expected at least 12.5%", "48 bytes", "lower --rank-multiple")),
    "too small for the multiple": (2, "--kv-size 25% --rank-multiple 8", ("expected at least 37.5%", "steps of 8")),
    "kept layers take it all": (2, "--kv-size 50% --layers 0", ("expected at least 70.8%",)),
    "an odd multiple": (2, "--kv-size 25% --rank-multiple 3", ("--rank-multiple: expected an even number",)),
    "a multiple of nothing": (2, "--rank 8 --rank-multiple 4", ("--rank-multiple:", "together with --kv-size")),
    "a budget and a rank": (2, "--kv-size 25% --rank 8", ("--rank and --kv-size", "give one of them")),
    "a budget and a rotary width": (2, "--kv-size 25% --rope-dim 4", ("--rope-dim: a KV size chooses",)),
    "steps without refinement": (2, "--rank 8 --refine-steps 5", ("--refine-steps: only with --refine",)),
    "minutes without refinement": (2, "--rank 8 --refine-minutes 5", ("--refine-minutes: only with --refine",)),
    "no steps": (2, "--rank 8 --refine --refine-steps 0", ("--refine-steps: expected a positive number, found 0",)),
    "no minutes": (2, "--rank 8 --refine --refine-minutes 0", ("--refine-minutes: expected a positive number",)),
    "minutes that are no number": (2, "--rank 8 --refine --refine-minutes nan", ("--refine-minutes: expected",)),
    "un-rotated width": (2, "--rank 8 --nope-dim 4", ("--nope-dim: only with --init paper",)),
    "text for weights alone": (
        2,
        "--init paper --rank 8 --calibration a.txt",
        ("--calibration: not with --init paper",),
    ),
    "refinement of weights alone": (2, "--init paper --rank 8 --refine", ("--refine: not with --init paper",)),
    "budget of weights alone": (2, "--init paper --kv-size 25%", ("--kv-size: not with --init paper",)),
    "rotary width above all": (2, "--rank 8 --rope-dim 18", ("--rope-dim: expected at most 16",)),
    "no calibration tokens": (2, "--rank 8 --calibration-tokens 0", ("--calibration-tokens: expected a positive",)),
    "missing text": (1, "--rank 8 --calibration nowhere.txt", ("--calibration: nowhere.txt was not found",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_refused(case: str, refuse: Refuse, source: Path, tmp_path: Path) -> None:
    code, arguments, sentences = OPTIONS[case]
    said = refuse(code, source, tmp_path / "out", "--quiet", *arguments.split()).sentence
    assert all(sentence in said for sentence in sentences), said


@pytest.mark.parametrize("content", ["", "w5 w6 w7"])
@pytest.mark.parametrize("refine", [(), ("--refine",)])
def test_too_little_text(content: str, refine: tuple[str, ...], refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    arguments = ("--rank", 8, "--quiet", "--calibration", tmp_path / "a.txt", *refine)
    said = refuse(1, source, tmp_path / "out", *arguments).sentence
    assert f"holds {len(content.split())} usable tokens, expected at least 1024" in said


def test_token_ids_of_another_model(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([[500] * 2000]))
    said = refuse(1, source, tmp_path / "out", "--rank", 8, "--quiet", "--calibration", tmp_path / "a.json").sentence
    assert "expected token ids below 96" in said and "found 500" in said


def test_a_source_that_is_too_large_to_sample_from(
    refuse: Refuse, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "available_memory_bytes", lambda: 10_000)
    said = refuse(1, source, tmp_path / "out", "--rank", 8, "--quiet").sentence
    assert "needs the whole source in memory" in said and "--calibration FILE" in said


def test_text_without_a_tokenizer(refuse: Refuse, tmp_path: Path) -> None:
    bare = build_checkpoint(tmp_path / "bare", "llama")
    (tmp_path / "a.txt").write_text("w5 " * 2000)
    said = refuse(1, bare, tmp_path / "out", "--rank", 8, "--quiet", "--calibration", tmp_path / "a.txt").sentence
    assert "no tokenizer could be loaded" in said


def test_without_text_no_tokenizer_is_needed(tmp_path: Path) -> None:
    """The source samples token ids: nothing is tokenised, and the output lacks what the source lacked."""
    bare = build_checkpoint(tmp_path / "bare", "llama")
    with pytest.raises(SystemExit) as done:
        main([str(bare), str(tmp_path / "out"), "--rank", "8", "--calibration-tokens", "1024", "--quiet"])
    assert done.value.code == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_a_work_folder_of_other_options(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run.json").write_text('{"fingerprint": "other"}')
    said = refuse(2, source, tmp_path / "out", "--rank", 8, "--quiet", "--work-dir", tmp_path / "work").sentence
    assert "holds results of another source or of other options" in said


def test_text_of_another_script(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("юг " * 900 + "w5 " * 900, encoding="utf-8")
    said = refuse(1, source, tmp_path / "out", "--rank", 8, "--quiet", "--calibration", tmp_path / "a.txt").sentence
    assert "the tokenizer maps 50% of" in said and "to its unknown token; give text in the model's own language" in said


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_text_that_leaves_directions_out_is_warned_of_by_layer(
    quiet: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token over and over: the inputs of the first layer are one vector. The conversion goes on, on a ridge."""
    (tmp_path / "a.json").write_text(json.dumps([[7] * 64] * 40))
    arguments = [source, tmp_path / "out", "--rank", 8, "--calibration", tmp_path / "a.json", *quiet]
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert not stopped.value.code
    said = capsys.readouterr().err
    assert ("warning: layer 0: the calibration text reaches only 1 of the 32 directions" in said) is not bool(quiet)
    report = json.loads((tmp_path / "out" / "xeco_report.json").read_text())
    assert report["summary"]["warnings"][0].startswith("layer 0: the calibration text reaches only 1 of the 32")
    assert "reaches only 1 of the 32" in (tmp_path / "out" / "xeco_report.html").read_text()

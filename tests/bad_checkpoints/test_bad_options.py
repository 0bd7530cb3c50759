"""Options that cannot be served: exit code 2 and one sentence that says what to change; nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_checkpoint
from safetensors.torch import load_file, save_file

Refuse = Callable[..., Any]
PAPER = ("--init", "paper")

# The model has hidden_size 32, 4 heads in 2 groups of head_dim 8, and 3 layers: full rank 32.
OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank 0": ("--rank 0", ("--rank: expected a whole number of at least 1, found 0",)),
    "negative rank": ("--rank -3", ("--rank: expected a whole number of at least 1, found -3",)),
    "rank above the full rank": ("--rank 33", ("--rank: expected at most 32", "found 33", "choose a smaller value")),
    "rank that is no number": ("--rank many", ("'many' is not a valid integer",)),
    "rank without its number": ("--rank", ("'--rank' requires an argument",)),
    "no rank": ("", ("add", "--rank 128")),
    "odd rotary width": ("--rank 12 --rope-dim 3", ("--rope-dim: expected an even number of at least 2, found 3",)),
    "rotary width 0": ("--rank 12 --rope-dim 0", ("--rope-dim: expected an even number of at least 2, found 0",)),
    "rotary width above the head": (
        "--rank 12 --rope-dim 10",
        ("--rope-dim: expected at most 8 (head_dim", "found 10"),
    ),
    "un-rotated width below 0": (
        "--rank 12 --nope-dim -1",
        ("--nope-dim: expected a whole number of at least 0, found -1",),
    ),
    "un-rotated width above the head": (
        "--rank 12 --nope-dim 9",
        ("--nope-dim: expected at most 8 (head_dim", "found 9"),
    ),
    "query rank 0": ("--rank 12 --q-rank 0", ("--q-rank: expected a whole number of at least 1, found 0",)),
    "query rank too large": ("--rank 12 --q-rank 33", ("--q-rank: expected at most 32", "found 33")),
    "layer out of range": ("--rank 12 --layers 0,3", ("--layers: expected layers from 0 to 2, found 3",)),
    "layers far out of range": ("--rank 12 --layers 0-99999", ("--layers: expected layers from 0 to 2, found 99999",)),
    "layers beyond reason": ("--rank 12 --layers 0-99999999999", ("--layers: expected a list such as 0-3,7",)),
    "layers that are no list": ("--rank 12 --layers a-b", ("--layers: expected a list such as 0-3,7, found 'a-b'",)),
    "layers backwards": ("--rank 12 --layers 2-0", ("--layers: expected a list such as 0-3,7, found '2-0'",)),
    "layers with a gap": ("--rank 12 --layers 0,,1", ("--layers: expected a list",)),
    "negative layer": ("--rank 12 --layers=-1", ("--layers: expected a list",)),
    "energy 0": ("--energy 0", ("--energy: expected a share in (0, 1], found 0.0",)),
    "energy in percent": ("--energy 90", ("--energy: expected a share in (0, 1], found 90.0",)),
    "energy that is no number": ("--energy nan", ("--energy: expected a share in (0, 1], found nan",)),
    "two policies": ("--rank 12 --energy 0.5", ("--rank and --energy",)),
    "fixed ends alone": ("--rank 12 --fixed-ends", ("--fixed-ends needs both",)),
    "fixed ends above the full rank": (
        "--rank 40 --energy 0.5 --fixed-ends",
        ("--rank: expected at most 32", "found 40"),
    ),
    "unknown dtype": ("--rank 12 --dtype int8", ("'int8' is not one of 'float32', 'bfloat16', 'float16'",)),
    "unknown initialisation": ("--rank 12 --init magic", ("Invalid value for '--init': 'magic' is not", "'paper'")),
    "unknown device": ("--rank 12 --device warp", ("--device: 'warp' cannot be used here", "choose cpu")),
    "size without a number": (
        "--rank 12 --max-shard-size big",
        ("--max-shard-size: expected a size such as 5GB", "'big'"),
    ),
    "size of 0": ("--rank 12 --max-shard-size 0GB", ("--max-shard-size: expected at least one byte",)),
    "size with an unknown unit": ("--rank 12 --max-shard-size 5XB", ("--max-shard-size: expected a size",)),
    "unknown option": ("--rank 12 --magic", ("No such option", "--magic")),
    "one argument too many": ("--rank 12 extra", ("unexpected extra argument (extra)",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_served_are_refused(source: Path, refuse: Refuse, case: str) -> None:
    options, words = OPTIONS[case]
    sentence = refuse(2, source, source.parent / "out", *PAPER, "--quiet", *options.split()).sentence
    for word in words:
        assert word in sentence


def test_a_missing_gpu_is_told(source: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    sentence = refuse(2, source, source.parent / "out", *PAPER, "--rank", 12, "--device", "cuda", "--quiet").sentence
    assert "--device: 'cuda' cannot be used here" in sentence and "choose cpu" in sentence


def test_a_full_rank_bounded_by_the_hidden_size_is_told(tmp_path: Path, refuse: Refuse) -> None:
    source = build_checkpoint(tmp_path / "in", "llama", num_key_value_heads=4)
    sentence = refuse(2, source, tmp_path / "out", *PAPER, "--rank", 33, "--quiet").sentence
    assert "--rank: expected at most 32" in sentence


def test_output_may_only_be_left_out_of_a_dry_run(source: Path, refuse: Refuse) -> None:
    assert "OUT is missing: give the folder to write" in refuse(2, source, *PAPER, "--rank", 12).sentence


def test_no_argument_at_all_is_told(refuse: Refuse) -> None:
    assert "Missing argument 'IN'" in refuse(2).sentence


def test_an_output_that_exists_is_refused(source: Path, refuse: Refuse) -> None:
    output = source.parent / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    sentence = refuse(2, source, output, *PAPER, "--rank", 12).sentence
    assert f"{output}: exists already; add --overwrite" in sentence


@pytest.mark.parametrize("place", [".", "out", "deep/er/out"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_inside_the_source_is_refused(
    source: Path, refuse: Refuse, place: str, overwrite: tuple[str, ...]
) -> None:
    sentence = refuse(2, source, source / place, *PAPER, "--rank", 12, *overwrite).sentence
    assert "what is written must lie outside what is read" in sentence and "choose another folder" in sentence


def test_an_output_around_the_source_is_refused(source: Path, refuse: Refuse) -> None:
    sentence = refuse(2, source, source.parent, *PAPER, "--rank", 12, "--overwrite").sentence
    assert "what is written must lie outside what is read" in sentence


def test_a_link_to_the_source_is_the_source(source: Path, refuse: Refuse) -> None:
    link = source.parent / "link"
    link.symlink_to(source)
    for arguments in ((source, link), (link, source), (link, source / "out"), (source, link / "out")):
        sentence = refuse(2, *arguments, *PAPER, "--rank", 12, "--overwrite").sentence
        assert "what is written must lie outside what is read" in sentence


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_that_is_a_file_or_link_is_refused(source: Path, refuse: Refuse, overwrite: tuple[str, ...]) -> None:
    (source.parent / "file").write_text("x")
    (source.parent / "elsewhere").mkdir()
    (source.parent / "link").symlink_to(source.parent / "elsewhere")
    (source.parent / "dangling").symlink_to(source.parent / "nowhere")
    for name in ("file", "link", "dangling"):
        sentence = refuse(2, source, source.parent / name, *PAPER, "--rank", 12, *overwrite).sentence
        assert "expected a folder or nothing, found a file or link" in sentence


def test_a_report_that_cannot_be_written_is_told_before_the_work(source: Path, refuse: Refuse) -> None:
    base = source.parent
    sentence = refuse(1, source, base / "out", *PAPER, "--rank", 12, "--json", base / "no" / "report.json").sentence
    assert "--json:" in sentence and "no such folder" in sentence
    sentence = refuse(2, source, base / "out", *PAPER, "--rank", 12, "--json", base).sentence
    assert "is a directory" in sentence


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_beyond_float16_are_refused_with_the_dtypes_that_hold_them(
    source: Path, refuse: Refuse, name: str
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors")
    sentence = refuse(2, source, source.parent / "out", *PAPER, "--rank", 12, "--dtype", "float16", "--quiet").sentence
    assert "does not fit into F16" in sentence and "choose bfloat16 or float32" in sentence
    assert "--dtype" in sentence and ("1e+05" in sentence or "1.00e+05" in sentence)


def test_distill_needs_a_converted_folder(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from xeco_convert.commandline.run import run_command
    from xeco_distill.cli.heal import distill_command

    with pytest.raises(SystemExit) as done:
        run_command(distill_command, [str(source)], "xeco-distill")
    assert done.value.code == 1
    assert "expected a checkpoint converted by xeco-convert" in capfd.readouterr().err

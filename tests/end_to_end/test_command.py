"""The command's own answers: help, version, plan, quiet, options; and that the Python API does the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import build_checkpoint
from commands import Runner
from fresh import run_fresh
from plots import rendered
from safetensors.torch import load_file

import xeco_convert
from xeco_convert.cli import main


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


HELP = [
    ("xeco_convert", []),
    *(("xeco_convert", [name]) for name in ("inspect", "sweep", "export", "refresh")),
    ("xeco_distill", []),
    ("xeco_distill", ["eval"]),
    ("xeco_distill", ["recipes"]),
]


@pytest.mark.parametrize(("package", "command"), HELP)
def test_help_imports_neither_torch_nor_transformers(package: str, command: list[str]) -> None:
    code = f"""
import sys
from {package}.cli import main
try:
    main({[*command, "--help"]!r})
except SystemExit as done:
    assert done.code == 0
heavy = {{"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert f"Usage: {package.replace('_', '-')}" in done.stdout


def test_help_names_every_option_and_the_subcommand(run: Runner) -> None:
    text = run("xeco-convert", "--help").stdout
    for name in xeco_convert.ConvertOptions.names():
        assert f"--{name.replace('_', '-')} " in text
    for word in ("--json", "--dry-run", "--quiet", "--version", "xeco-convert inspect FOLDER", "IN", "OUT"):
        assert word in text


def test_version_tells_torch_and_devices(run: Runner) -> None:
    text = run("xeco-convert", "--version").stdout
    assert f"xeco-convert {xeco_convert.__version__}" in text
    assert f"torch {torch.__version__}" in text and "cpu:" in text and "gpu:" in text


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Runner, llama: Path, tmp_path: Path) -> None:
    done = run(
        "xeco-convert",
        llama,
        tmp_path / "out",
        "--rank",
        12,
        "--init",
        "paper",
        "--dry-run",
        "--json",
        tmp_path / "plan.json",
    )
    assert "3 of 3 layers get kv_lora_rank 12, qk_rope_head_dim 4 (default), qk_nope_head_dim 4" in done.stdout
    assert "KV cache: 384 -> 192 bytes per token (50.0%)" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [layer["kv_numbers_after"] for layer in plan["layers"]] == [16, 16, 16]
    assert plan["ranks_are_final"] is True and plan["dtype"] == "F32"


def test_the_plan_has_the_sizes_of_what_is_written(
    llama: Path, converted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            [
                str(llama),
                "--init",
                "paper",
                "--rank",
                "12",
                "--rope-dim",
                "4",
                "--dry-run",
                "--quiet",
                "--json",
                str(tmp_path / "plan.json"),
            ]
        )
    assert done.value.code == 0 and capsys.readouterr().out == ""
    plan, tensors = json.loads((tmp_path / "plan.json").read_text()), load_file(converted / "model.safetensors")
    assert plan["num_tensors"] == len(tensors)
    assert plan["weights_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_quiet_prints_nothing_and_the_api_does_the_same(run: Runner, llama: Path, tmp_path: Path) -> None:
    done = run("xeco-convert", llama, tmp_path / "out", "--init", "paper", "--rank", 12, "--rope-dim", 4, "--quiet")
    assert done.stdout == done.stderr == ""
    with rendered():
        xeco_convert.convert(llama, tmp_path / "api", init="paper", rank=12, rope_dim=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "api")


def test_a_folder_named_inspect_can_be_converted(run: Runner, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "inspect").symlink_to(llama)
    done = run("xeco-convert", "./inspect", "--rank", 12, "--init", "paper", "--dry-run", cwd=tmp_path)
    assert "3 of 3 layers" in done.stdout


def test_ranks_by_energy_differ_by_layer_and_ends_may_be_fixed(run: Runner, tinystories: Path, tmp_path: Path) -> None:
    options = ("--init", "paper", "--energy", 0.5, "--fixed-ends", "--rank", 20, "--json", tmp_path / "report.json")
    done = run("xeco-convert", tinystories, tmp_path / "out", *options)
    ranks = [layer["kv_lora_rank"] for layer in json.loads((tmp_path / "report.json").read_text())["layers"]]
    assert ranks[0] == ranks[-1] == 20
    assert all(rank % 8 == 0 and 8 <= rank < 256 for rank in ranks[1:-1])
    assert "kv_lora_rank by energy 0.5" in done.stderr and "at most" in done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [layer["kv_lora_rank"] for layer in config["mla_layers"]] == ranks
    assert "fixed_ends" in config["conversion"]["options"]


HUB_ID, COMMIT = "someone/tiny-llama", "a" * 40


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A folder in the layout of huggingface_hub's cache: files are links into blobs/."""
    folder = build_checkpoint(tmp_path / "downloaded", "llama", tokenizer=True, num_shards=2)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    base = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (base / part).mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(base / "blobs" / str(number))
        (base / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    (base / "refs" / "v1").write_text(COMMIT)
    (base / "refs" / "main").write_text("b" * 40)
    return tmp_path / "hub"


def test_a_hub_id_is_taken_from_the_cache_at_its_revision(run: Runner, hub_cache: Path, tmp_path: Path) -> None:
    environment = {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    run(
        "xeco-convert",
        HUB_ID,
        tmp_path / "out",
        "--init",
        "paper",
        "--rank",
        12,
        "--revision",
        "v1",
        environment=environment,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["conversion"]["source"] == {"model_type": "llama", "path": HUB_ID, "revision": COMMIT}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {HUB_ID}" in card and "license: apache-2.0" in card and "# tiny-llama with" in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_revision_that_the_cache_lacks_is_told(hub_cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    arguments = (HUB_ID, str(tmp_path / "out"), "--rank", "12", "--revision", "v2")
    done = run_fresh("from xeco_convert.cli import main; main()", *arguments, environment=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(f"xeco-convert: {HUB_ID}: neither a folder nor a model that the Hugging Face hub")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_inspect_of_something_else_is_told(run: Runner, llama: Path) -> None:
    done = run("xeco-convert", "inspect", llama, code=1)
    assert "expected a checkpoint converted by xeco-convert, found model_type 'llama'" in done.stderr
    assert len(done.stderr.splitlines()) == 1

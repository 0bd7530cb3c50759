"""bench_convert's parts work on a tiny shape; no test here looks at a clock."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import bench_convert
import pytest
import torch
from bench_convert import CommandTimes, FactorTimes, Seconds, ShapeResult, run_measured, time_command, time_factors
from random_checkpoint import SHAPES, link_shallower, write_checkpoint
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan

TINY: dict[str, Any] = {
    **SHAPES["llama-3.2-1b"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 16,
    "head_dim": 8,
    "vocab_size": 61,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**TINY, "tie_word_embeddings": request.param}


@pytest.fixture(scope="module")
def checkpoint(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "deep"
    write_checkpoint(folder, config, 3)
    return folder


def test_random_checkpoints_are_whole_sharded_and_random(checkpoint: Path, config: dict[str, Any]) -> None:
    plan = make_plan(CheckpointIndex.open(checkpoint), ConvertOptions(rank=8))
    assert len(plan.layers) == 3 and plan.dtype == "BF16" and not plan.dropped
    assert len(list(checkpoint.glob("*.safetensors"))) == (5 if config["tie_word_embeddings"] else 6)
    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    first, second = (model.model.layers[layer].self_attn.k_proj.weight.float() for layer in (0, 1))
    assert 0.1 < first.std() * 32**0.5 < 2 and not torch.equal(first, second)


def test_the_shallower_checkpoint_shares_the_files(checkpoint: Path, config: dict[str, Any], tmp_path: Path) -> None:
    link_shallower(checkpoint, tmp_path / "shallow", config, 1)
    deep, shallow = CheckpointIndex.open(checkpoint), CheckpointIndex.open(tmp_path / "shallow")
    assert shallow.config["num_hidden_layers"] == 1
    assert set(shallow.headers) == {
        name for name in deep.headers if ".layers.1." not in name and ".layers.2." not in name
    }
    for name, file in shallow.files.items():
        assert file.samefile(deep.files[name])
        with safe_open(file, framework="pt") as handle:
            assert name in handle.keys()  # noqa: SIM118 (a handle is no dict)


def test_both_ways_give_the_same_factors(checkpoint: Path, config: dict[str, Any]) -> None:
    times = time_factors(checkpoint, config, rank=8, num_runs=1, with_thin=True)
    assert times.naive_thin is not None
    # float32 against float64: 3e-7 was observed
    assert times.reconstruction_difference < 1e-5


def test_shapes_are_those_of_the_real_models() -> None:
    sizes = {name: bench_convert.layer_shapes(config, 0) for name, config in SHAPES.items()}
    assert sizes["llama-3.2-1b"]["model.layers.0.self_attn.k_proj.weight"] == (512, 2048)
    assert sizes["llama-3.1-8b"]["model.layers.0.self_attn.v_proj.weight"] == (1024, 4096)
    assert sizes["llama-3.1-8b"]["model.layers.0.mlp.down_proj.weight"] == (4096, 14336)


def test_memory_of_a_command_is_its_own() -> None:
    ballast = torch.ones(2**27)  # 512 MiB in this process must not count for the one that it starts
    run = run_measured([sys.executable, "-c", "data = bytearray(64 * 2**20)"], threads=1)
    assert run.exit_code == 0
    assert 64 * 2**20 < run.peak_rss_bytes < 256 * 2**20
    assert ballast[-1] == 1


def test_a_failing_command_is_told_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3: (?s:.*)no luck"):
        run_measured([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], threads=1)


@pytest.mark.slow
def test_the_installed_command_is_measured_at_two_depths(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deep", TINY, 2)
    options = argparse.Namespace(runs=1, threads=1, layers_made=2)
    times = time_command(tmp_path / "deep", TINY, 8, tmp_path, options)
    assert times.peak_rss_bytes > 50 * 2**20
    assert (times.layers, times.full_layers) == (2, 16)
    assert times.layer_bytes == 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert times.outer_bytes == 2 * (61 * 32 + 32)
    assert not (tmp_path / "converted").exists()


def result(peak_rss_bytes: int, naive_cpu: float) -> ShapeResult:
    def seconds(cpu: float) -> Seconds:
        return Seconds(wall=cpu, cpu=cpu, num_runs=3)

    command = CommandTimes(
        **{"layers": 3, "full_layers": 16, "deep": seconds(10.0), "shallow": seconds(6.0), "startup": seconds(2.0)},
        **{"peak_rss_bytes": peak_rss_bytes, "peak_rss_shallow_bytes": 1, "layer_bytes": 10**8, "outer_bytes": 10**9},
    )
    factors = FactorTimes(ours=seconds(0.5), naive=seconds(naive_cpu), naive_thin=None, reconstruction_difference=0.0)
    return ShapeResult(shape="llama-3.2-1b", rank=8, factors=factors, command=command)


def test_extrapolation_is_the_measured_run_and_the_missing_layers() -> None:
    found = result(peak_rss_bytes=1, naive_cpu=5.5)
    assert found.command.layer_cpu_seconds == 2.0  # (10 - 6) / 2 layers
    assert found.command.copy_cpu_seconds_per_gb == 2.0  # 6 - a layer's 2 - imports 2, over 1 GB
    assert found.command.full_cpu_seconds == 10 + 13 * 2
    assert found.command.full_wall_seconds == 36
    assert found.naive_full_cpu_seconds == 36 + 16 * 5
    assert json.loads(json.dumps(found.to_dict()))["derived"]["speedup_cpu"] == 11.0


def test_claims_pass_and_fail_at_their_bounds() -> None:
    bound = 2 * 10**8 + 2**30
    assert set(result(bound, 5.0).claims().values()) == {True}
    assert set(result(bound + 1, 4.9).claims().values()) == {False}


def test_the_tables_show_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    found = [result(peak_rss_bytes=2**30, naive_cpu=5.5)]
    assert "11.0 x" in bench_convert.factor_table(found)
    assert "yes" in bench_convert.memory_table(found)
    assert "36" in bench_convert.time_table(found)

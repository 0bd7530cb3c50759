"""Seconds and peak memory of `xeco-convert` on checkpoints of the shape of real models, beside the published way.

    python benchmarks/bench_convert.py --json benchmarks/results/convert.json

Two claims are checked, and the exit code is 1 where one fails: one layer's key/value factors come at least 10 times faster
than from the SVD of the repeated matrix (at the 1B shape), and the command's peak RSS stays below the two largest decoder
layers + 1 GiB. Weights are random, a few layers are made; what is extrapolated to the full depth is said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES, layer_shapes, link_shallower, write_checkpoint
from reporting import describe, format_table, machine_facts, write_json
from torch import Tensor

from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.joint_svd import joint_key_value_factors

GIB = 2**30
SPEEDUP_CLAIM = 10.0
_DEFAULT_SHAPES = ("llama-3.2-1b", "llama-3.1-8b")
SPEEDUP_SHAPE = "llama-3.2-1b"


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Medians of several runs. With one thread, CPU seconds are what an idle machine would need; wall seconds also count
    waiting for the disk, and for whoever else runs on the machine."""

    wall: float
    cpu: float
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class FactorTimes:
    """Key/value factors of one layer: this package's way, the published one (all of U), and that with a thin U."""

    ours: Seconds
    naive: Seconds
    naive_thin: Seconds | None
    reconstruction_difference: float

    @property
    def speedup(self) -> float:
        """CPU seconds of the published way over ours."""
        return self.naive.cpu / self.ours.cpu


@dataclass(frozen=True, kw_only=True)
class CommandRun:
    """One run of a command, as measured_command.py gives it."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class CommandTimes:
    """The command at two depths and its imports alone, and what follows from the differences.

    Differences are taken of CPU seconds, which repeat within a few percent; waiting for the disk does not, and is counted per
    byte of the deep run.
    """

    layers: int
    full_layers: int
    deep: Seconds
    shallow: Seconds
    startup: Seconds
    peak_rss_bytes: int
    peak_rss_shallow_bytes: int
    layer_bytes: int
    outer_bytes: int

    @property
    def layer_cpu_seconds(self) -> float:
        """One more decoder layer: attention converted, the rest copied."""
        return (self.deep.cpu - self.shallow.cpu) / (self.layers - 1)

    @property
    def copy_cpu_seconds_per_gb(self) -> float:
        """Copying 10⁹ bytes of embeddings and head: a run without its layers and imports."""
        return (self.shallow.cpu - self.layer_cpu_seconds - self.startup.cpu) / (self.outer_bytes / 1e9)

    @property
    def waiting_seconds_per_gb(self) -> float:
        """Wall seconds beyond the CPU's for 10⁹ bytes of source: disk, and whoever else runs on the machine."""
        return max(0.0, self.deep.wall - self.deep.cpu) / ((self.outer_bytes + self.layers * self.layer_bytes) / 1e9)

    @property
    def full_cpu_seconds(self) -> float:
        """Extrapolated to the real depth: the measured run, and the missing layers at a layer's seconds."""
        return self.deep.cpu + (self.full_layers - self.layers) * self.layer_cpu_seconds

    @property
    def full_wall_seconds(self) -> float:
        """Extrapolated to the real depth, with the waiting that its bytes would take."""
        full_bytes = self.outer_bytes + self.full_layers * self.layer_bytes
        return self.full_cpu_seconds + self.waiting_seconds_per_gb * full_bytes / 1e9

    @property
    def bound_bytes(self) -> int:
        """The claim: the two largest decoder layers, as stored, and 1 GiB."""
        return 2 * self.layer_bytes + GIB


def naive_factors(source: SourceAttention, rank: int, *, thin: bool = False) -> tuple[Tensor, Tensor]:
    """The published way (arXiv 2503.11132): keys and values [G·d, hidden] repeated to all heads, stacked, one SVD in float32.

    Its authors' code (AMD-AGI/AMD-Hybrid-Models, X-EcoMLA/mla/hybrid_mla_layer.py) calls torch.linalg.svd with its defaults,
    which makes all columns of U; `thin` spares those that nobody reads. Left [2·H·d, rank] and right [rank, hidden].
    """
    repeated = [
        weight.float()
        .view(source.num_key_value_heads, source.head_dim, -1)
        .repeat_interleave(source.heads_per_group, dim=0)
        .flatten(0, 1)
        for weight in (source.k_weight, source.v_weight)
    ]
    left, values, right = torch.linalg.svd(torch.cat(repeated), full_matrices=not thin)
    return left[:, :rank], values[:rank, None] * right[:rank]


def time_factors(folder: Path, config: Mapping[str, Any], rank: int, num_runs: int, *, with_thin: bool) -> FactorTimes:
    """Time the ways on layer 0, in turns, so that all meet the same machine."""
    source = _read_attention(folder, config)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: joint_key_value_factors(source, rank),
        "naive": lambda: naive_factors(source, rank),
    }
    if with_thin:
        ways["thin"] = lambda: naive_factors(source, rank, thin=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    made: dict[str, Any] = {}
    for _ in range(num_runs):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            made[name] = way()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    ours, (left, right) = made["ours"], made["naive"]
    product = (ours.left @ ours.right).float()
    return FactorTimes(
        ours=_median(times["ours"]),
        naive=_median(times["naive"]),
        naive_thin=_median(times["thin"]) if with_thin else None,
        reconstruction_difference=float((product - left @ right).norm() / product.norm()),
    )


def _read_attention(folder: Path, config: Mapping[str, Any]) -> SourceAttention:
    reader, prefix = TensorReader(CheckpointIndex.open(folder)), "model.layers.0."
    tensors = {
        f"{which}_weight": reader.read(f"{prefix}self_attn.{which}_proj.weight", dtype=torch.float32)
        for which in "qkvo"
    }
    return SourceAttention(
        **tensors,
        input_norm_weight=reader.read(f"{prefix}input_layernorm.weight", dtype=torch.float32),
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )


def _median(runs: Sequence[tuple[float, float]]) -> Seconds:
    walls, cpus = zip(*runs, strict=True)
    return Seconds(wall=statistics.median(walls), cpu=statistics.median(cpus), num_runs=len(runs))


def run_measured(command: Sequence[str], threads: int) -> CommandRun:
    """Run a command in a process of its own. Raises `RuntimeError` where it fails."""
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("measured_command.py"))]
    done = subprocess.run(
        [*launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=True,
    )
    run = CommandRun(**json.loads(done.stdout))
    if run.exit_code != 0:
        raise RuntimeError(f"{command[0]} failed with exit code {run.exit_code}: {done.stderr.strip()}")
    return run


def run_conversion(source: Path, work_dir: Path, rank: int, rope_dim: int, threads: int) -> CommandRun:
    """Convert with the installed command, as a user does, and remove what it wrote.

    Raises `RuntimeError` where the command is not installed or fails.
    """
    command = shutil.which(
        "xeco-convert", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if command is None:
        raise RuntimeError("xeco-convert is not installed: run `pip install -e .` in the repository first")
    output, report = work_dir / "converted", work_dir / "report.json"
    options = ["--init", "paper", "--rank", str(rank), "--rope-dim", str(rope_dim), "--quiet", "--json", str(report)]
    run = run_measured([command, str(source), str(output), *options], threads)
    shutil.rmtree(output)
    return run


def time_command(
    deep: Path, config: Mapping[str, Any], rank: int, work_dir: Path, options: argparse.Namespace
) -> CommandTimes:
    """Run the command on all layers made and on one of them, and its imports alone, in turns."""
    shallow = work_dir / "shallow"
    link_shallower(deep, shallow, config, 1)
    imports = [sys.executable, "-c", "import xeco_convert.conversion"]
    runs: dict[str, list[CommandRun]] = {"deep": [], "shallow": [], "startup": []}
    for _ in range(options.runs):
        for name, folder in (("deep", deep), ("shallow", shallow)):
            runs[name].append(run_conversion(folder, work_dir, rank, config["head_dim"] // 2, options.threads))
        runs["startup"].append(run_measured(imports, options.threads))
    medians = {name: _median([(run.wall_seconds, run.cpu_seconds) for run in found]) for name, found in runs.items()}
    headers = CheckpointIndex.open(deep).headers
    layer_bytes = sum(headers[name].num_bytes for name in layer_shapes(config, 0))
    return CommandTimes(
        layers=options.layers_made,
        full_layers=config["num_hidden_layers"],
        **medians,
        peak_rss_bytes=max(run.peak_rss_bytes for run in runs["deep"]),
        peak_rss_shallow_bytes=max(run.peak_rss_bytes for run in runs["shallow"]),
        layer_bytes=layer_bytes,
        outer_bytes=sum(header.num_bytes for header in headers.values()) - options.layers_made * layer_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class ShapeResult:
    """Everything measured at one shape."""

    shape: str
    rank: int
    factors: FactorTimes
    command: CommandTimes

    @property
    def naive_full_cpu_seconds(self) -> float:
        """Extrapolated: the same command with the published decomposition in place of ours in each layer."""
        more = self.factors.naive.cpu - self.factors.ours.cpu
        return self.command.full_cpu_seconds + self.command.full_layers * more

    def claims(self) -> dict[str, bool]:
        """What is promised, and whether it holds."""
        held = {f"{self.shape}: peak RSS <= 2 layers + 1 GiB": self.command.peak_rss_bytes <= self.command.bound_bytes}
        if self.shape == SPEEDUP_SHAPE:
            held[f"{self.shape}: factors >= {SPEEDUP_CLAIM:.0f} x faster"] = self.factors.speedup >= SPEEDUP_CLAIM
        return held

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, derived figures included."""
        command = self.command
        derived = {
            "speedup_cpu": self.factors.speedup,
            "speedup_wall": self.factors.naive.wall / self.factors.ours.wall,
            "layer_cpu_seconds": command.layer_cpu_seconds,
            "copy_cpu_seconds_per_gb": command.copy_cpu_seconds_per_gb,
            "waiting_seconds_per_gb": command.waiting_seconds_per_gb,
            "bound_bytes": command.bound_bytes,
            "extrapolated_full_cpu_seconds": command.full_cpu_seconds,
            "extrapolated_full_wall_seconds": command.full_wall_seconds,
            "extrapolated_naive_full_cpu_seconds": self.naive_full_cpu_seconds,
        }
        return {**dataclasses.asdict(self), "derived": derived, "claims": self.claims()}


def measure_shape(shape: str, options: argparse.Namespace) -> ShapeResult:
    """Make the checkpoint, time both, remove it."""
    config = SHAPES[shape]
    rank = options.rank or config["num_key_value_heads"] * config["head_dim"] // 2
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="xeco-bench-") as folder:
        work_dir = Path(folder)
        deep = work_dir / "deep"
        _say(f"{shape}: writing {options.layers_made} random layers")
        write_checkpoint(deep, config, options.layers_made)
        _say(f"{shape}: {2 * options.runs} runs of xeco-convert")
        command = time_command(deep, config, rank, work_dir, options)
        _say(f"{shape}: factors of one layer, both ways")
        factors = time_factors(deep, config, rank, options.runs, with_thin=shape == SPEEDUP_SHAPE)
    return ShapeResult(shape=shape, rank=rank, factors=factors, command=command)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def factor_table(results: Sequence[ShapeResult]) -> str:
    """Seconds for the key/value factors of one layer."""
    columns = (
        "shape",
        "rank",
        "ours CPU s",
        "ours wall s",
        "SVD CPU s",
        "SVD wall s",
        "thin SVD CPU s",
        "speed-up",
        "same",
    )
    rows = []
    for result in results:
        times = result.factors
        thin = None if times.naive_thin is None else times.naive_thin.cpu
        seconds = [times.ours.cpu, times.ours.wall, times.naive.cpu, times.naive.wall, thin]
        same = f"{times.reconstruction_difference:.1e}"
        rows.append([result.shape, result.rank, *seconds, f"{times.speedup:.1f} x", same])
    return format_table(columns, rows)


def memory_table(results: Sequence[ShapeResult]) -> str:
    """Peak RSS of the command against its bound."""
    columns = (
        "shape",
        "layers made",
        "weights GB",
        "1 layer MiB",
        "peak RSS MiB",
        "at 1 layer MiB",
        "bound MiB",
        "holds",
    )
    rows = []
    for result in results:
        command = result.command
        weights = (command.outer_bytes + command.layers * command.layer_bytes) / 1e9
        sizes = (command.layer_bytes, command.peak_rss_bytes, command.peak_rss_shallow_bytes, command.bound_bytes)
        holds = "yes" if command.peak_rss_bytes <= command.bound_bytes else "NO"
        rows.append([result.shape, command.layers, f"{weights:.2f}", *(f"{size / 2**20:.0f}" for size in sizes), holds])
    return format_table(columns, rows)


def time_table(results: Sequence[ShapeResult]) -> str:
    """Seconds of the command: measured on the layers made, then extrapolated to the full depth."""
    columns = (
        "shape",
        "layers made",
        "measured wall s",
        "measured CPU s",
        "start-up CPU s",
        "1 layer CPU s",
        "copy CPU s/GB",
        "waiting s/GB",
        "full depth",
        "extrapolated CPU s",
        "extrapolated wall s",
        "with SVD, CPU s",
    )
    rows = []
    for result in results:
        command = result.command
        measured = [command.deep.wall, command.deep.cpu, command.startup.cpu]
        parts = [command.layer_cpu_seconds, command.copy_cpu_seconds_per_gb, command.waiting_seconds_per_gb]
        totals = [command.full_cpu_seconds, command.full_wall_seconds, result.naive_full_cpu_seconds]
        cells = [f"{seconds:.2f}" for seconds in (*measured, *parts)]
        rows.append(
            [result.shape, command.layers, *cells, command.full_layers, *(f"{seconds:.0f}" for seconds in totals)]
        )
    return format_table(columns, rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=sorted(SHAPES), default=list(_DEFAULT_SHAPES), help="shapes [Llama's]"
    )
    parser.add_argument("--layers-made", type=int, default=3, help="decoder layers of the made checkpoints, >= 2 [3]")
    parser.add_argument("--rank", type=int, help="kv_lora_rank [a quarter of the source's cache]")
    parser.add_argument("--runs", type=int, default=3, help="runs of everything; medians are given [3]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both ways [1]")
    parser.add_argument("--work-dir", type=Path, help="folder for checkpoints (8 GB), removed afterwards [temporary]")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if options.layers_made < 2 or options.runs < 1:
        parser.error("--layers-made must be at least 2 (a layer's time is a difference), --runs at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    machine = machine_facts()
    results = [measure_shape(shape, options) for shape in options.shape]
    print(f"{describe(machine)}; medians of {options.runs} runs")
    print(
        "\nKey/value factors of one layer: this package, and the SVD of the repeated matrix (arXiv 2503.11132), float32"
    )
    print(factor_table(results))
    print("\nPeak memory of the command `xeco-convert`")
    print(memory_table(results))
    print("\nTime of the command, measured on the layers made and extrapolated to the full depth")
    print(time_table(results))
    claims = {claim: held for result in results for claim, held in result.claims().items()}
    for claim, held in claims.items():
        print(f"{'pass' if held else 'FAIL'}: {claim}")
    settings = {name: getattr(options, name) for name in ("shape", "layers_made", "rank", "runs", "threads")}
    rows = [result.to_dict() for result in results]
    write_json(options.json, {"benchmark": "convert", "machine": machine, "settings": settings, "rows": rows})
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

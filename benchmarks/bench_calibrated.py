"""What the calibrated default costs: seconds of the whole command on a pretrained model, and peak memory at two depths.

    python benchmarks/bench_calibrated.py --json benchmarks/results/calibrated.json

Claims, and the exit code is 1 where one fails: on tinystories-gqa the command takes at most 60 s, with --refine at most 5
minutes, on 2 threads of an idle machine; and its peak RSS at the full depth of a SmolLM-135M (30 layers, random weights) is
no more than 10 % above that at a third of it, whether the layers are surveyed, converted or refined.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_convert import CommandRun, run_measured
from random_checkpoint import link_shallower, write_checkpoint
from reporting import describe, format_table, machine_facts, write_json

_REPOSITORY = Path(__file__).resolve().parents[1]
CLOSED_FORM_LIMIT, REFINE_LIMIT = 60.0, 300.0
GROWTH_CLAIM = 1.10
# config.json of the real model, as far as shapes and speed go
SMOLLM_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "head_dim": 64,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class TimedCase:
    """A command line on tinystories-gqa, and the wall seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    limit: float


def timed_cases(text: Path) -> tuple[TimedCase, ...]:
    """The default on text and on the model's own samples, and refined on four times the text, as bench_fidelity.py does."""
    given, refined = ("--calibration", str(text)), ("--refine", "--calibration-tokens", str(96 * 512))
    return (
        TimedCase(name="text, 25%", arguments=("--kv-size", "25%", *given), limit=CLOSED_FORM_LIMIT),
        TimedCase(name="self-sampled, 25%", arguments=("--kv-size", "25%"), limit=CLOSED_FORM_LIMIT),
        TimedCase(name="--refine, 50%", arguments=("--kv-size", "50%", *given, *refined), limit=REFINE_LIMIT),
    )


@dataclass(frozen=True, kw_only=True)
class TimedRow:
    """Medians of the runs of a case; CPU seconds beside them, which waiting for others does not change."""

    case: TimedCase
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int

    @property
    def holds(self) -> bool:
        return self.wall_seconds <= self.case.limit


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Peak RSS of the command at a third of the depth and at the full one."""

    name: str
    layers: tuple[int, int]
    shallow: CommandRun
    deep: CommandRun

    @property
    def growth(self) -> float:
        return self.deep.peak_rss_bytes / self.shallow.peak_rss_bytes

    @property
    def holds(self) -> bool:
        return self.growth <= GROWTH_CLAIM


def run_conversion(source: Path, arguments: Sequence[str], work_dir: Path, threads: int) -> CommandRun:
    """The installed command, as a user runs it; what it wrote is removed. Raises `RuntimeError` where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = shutil.which("xeco-convert", path=path)
    if command is None:
        raise RuntimeError("xeco-convert is not installed: run `pip install -e .` in the repository first")
    output = work_dir / "converted"
    run = run_measured([command, str(source), str(output), "--quiet", *arguments], threads)
    shutil.rmtree(output)
    return run


def time_cases(checkpoint: Path, text: Path, work_dir: Path, options: argparse.Namespace) -> list[TimedRow]:
    """Every case, `--runs` times."""
    rows = []
    for case in timed_cases(text):
        print(f"{checkpoint.name}: {case.name}", file=sys.stderr, flush=True)
        runs = [run_conversion(checkpoint, case.arguments, work_dir, options.threads) for _ in range(options.runs)]
        rows.append(
            TimedRow(
                case=case,
                wall_seconds=statistics.median(run.wall_seconds for run in runs),
                cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
                peak_rss_bytes=max(run.peak_rss_bytes for run in runs),
            )
        )
    return rows


def memory_rows(work_dir: Path, config: dict[str, Any], options: argparse.Namespace) -> list[MemoryRow]:
    """The command on a random checkpoint of full depth and on a third of its layers, calibrated on random tokens."""
    layers = (max(1, config["num_hidden_layers"] // 3), config["num_hidden_layers"])
    deep, shallow = work_dir / "deep", work_dir / "shallow"
    write_checkpoint(deep, config, layers[1])
    link_shallower(deep, shallow, config, layers[0])
    for folder in (deep, shallow):
        write_tokenizer(folder, config["vocab_size"])
    tokens = work_dir / "tokens.json"
    ids = torch.randint(config["vocab_size"], (32, 512), generator=torch.Generator().manual_seed(0))
    tokens.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    given = ("--kv-size", "25%", "--calibration", str(tokens), "--calibration-tokens", str(options.memory_tokens))
    cases = {"default": given, "--refine": (*given, "--refine", "--refine-steps", "4")}
    rows = []
    for name, arguments in cases.items():
        print(f"memory: {name}", file=sys.stderr, flush=True)
        runs = [run_conversion(folder, arguments, work_dir, options.threads) for folder in (shallow, deep)]
        rows.append(MemoryRow(name=name, layers=layers, shallow=runs[0], deep=runs[1]))
    return rows


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for each token id: calibration needs a tokenizer even where the tokens are given."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token=None)).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def time_table(rows: Sequence[TimedRow]) -> str:
    """Seconds of the command against their limits."""
    columns = ("conversion", "wall s", "CPU s", "limit s", "holds", "peak RSS MiB")
    return format_table(
        columns,
        [
            [
                row.case.name,
                f"{row.wall_seconds:.1f}",
                f"{row.cpu_seconds:.1f}",
                f"{row.case.limit:.0f}",
                "yes" if row.holds else "NO",
                f"{row.peak_rss_bytes / 2**20:.0f}",
            ]
            for row in rows
        ],
    )


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Peak RSS at both depths."""
    columns = ("conversion", "layers", "peak RSS MiB", "layers", "peak RSS MiB", "growth", "at most", "holds")
    return format_table(
        columns,
        [
            [
                row.name,
                row.layers[0],
                f"{row.shallow.peak_rss_bytes / 2**20:.0f}",
                row.layers[1],
                f"{row.deep.peak_rss_bytes / 2**20:.0f}",
                f"{row.growth:.3f}",
                GROWTH_CLAIM,
                "yes" if row.holds else "NO",
            ]
            for row in rows
        ],
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("time", "memory"), help="measure this alone [both]")
    parser.add_argument("--runs", type=int, default=1, help="runs of every timed case; medians are given [1]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the command [2]")
    parser.add_argument("--memory-tokens", type=int, default=4096, help="calibration tokens of the memory part [4096]")
    parser.add_argument("--work-dir", type=Path, help="folder for checkpoints (1 GB), removed afterwards [temporary]")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    options = parse_arguments(arguments)
    machine = machine_facts() | {"command_threads": options.threads}
    shared = Path(os.environ.get("XECO_SHARED", _REPOSITORY.parent / "shared"))
    timed: list[TimedRow] = []
    measured: list[MemoryRow] = []
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="xeco-bench-") as folder:
        if options.part != "memory":
            checkpoint, text = shared / "checkpoints" / "tinystories-gqa", shared / "text" / "train.txt"
            timed = time_cases(checkpoint, text, Path(folder), options)
        if options.part != "time":
            measured = memory_rows(Path(folder), SMOLLM_135M, options)
    print(f"{describe(machine)}; the command on {options.threads} threads")
    if timed:
        print(f"\nSeconds of `xeco-convert` on tinystories-gqa, medians of {options.runs}\n{time_table(timed)}")
    if measured:
        print(f"\nPeak memory, random weights of the shape of SmolLM-135M\n{memory_table(measured)}")
    claims = {f"time: {row.case.name}": row.holds for row in timed}
    claims |= {f"memory: {row.name}": row.holds for row in measured}
    for claim, held in claims.items():
        print(f"{'pass' if held else 'FAIL'}: {claim}")
    settings = {name: getattr(options, name) for name in ("part", "runs", "threads", "memory_tokens")}
    rows = {
        "time": [dataclasses.asdict(row) for row in timed],
        "memory": [dataclasses.asdict(row) for row in measured],
    }
    data = {"benchmark": "calibrated", "machine": machine, "settings": settings, **rows, "claims": claims}
    write_json(options.json, json.loads(json.dumps(data).replace(f"{shared}{os.sep}", "")))
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

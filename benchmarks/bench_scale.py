"""What one more layer costs the calibrated conversion, for the shapes of real models: counted, measured, extrapolated.

    python benchmarks/bench_scale.py --json benchmarks/results/scale.json

Random weights of each shape, with one layer and with two (--layers-made), are converted at half of their cache by `--rank` and
`--rope-dim`; the difference is a layer's CPU seconds, by the parts of the work. Counted beside it are the multiplications and
additions that the formulas need, so that what is far from the machine's speed shows. Extrapolated: the run at one layer and as
many of the difference as the real model has layers more: at fixed widths every layer costs the same, whatever the depth.
`--kv-size` adds a survey, of whose branches there are 32 at most.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_calibrated import write_tokenizer
from random_checkpoint import SHAPES, layer_shapes, link_shallower, write_checkpoint
from reporting import describe, format_table, machine_facts, write_json

import xeco_convert

_WINDOW = 512
_MEASURED_TOKENS = 4096  # that every conversion takes besides those it calibrates on
_PARTS = ("source", "closed form", "refit", "converted model", "measuring")


def widths_of(config: dict[str, Any]) -> tuple[int, int]:
    """Rank and rotary width of half the cache: a third of it is the rotary key, within one head's width of each group."""
    half = config["num_key_value_heads"] * config["head_dim"]
    rope = min(half // 3 // 16 * 16, config["head_dim"])
    return half - rope, rope


def counted(config: dict[str, Any], tokens: int) -> dict[str, float]:
    """Floating-point operations of one layer, by part: two for every product that is added up; softmax and norms are left out."""
    rank, rope = widths_of(config)
    heads, dim, hidden = config["num_attention_heads"], config["head_dim"], config["hidden_size"]
    width = config["num_key_value_heads"] * dim
    every = tokens + _MEASURED_TOKENS
    sizes = {name: shape for name, shape in layer_shapes(config, 0).items() if len(shape) == 2}
    weights = {name: shape[0] * shape[1] for name, shape in sizes.items()}
    mlp = sum(count for name, count in weights.items() if ".mlp." in name)
    attention = sum(weights.values()) - mlp
    seen = _WINDOW / 2  # tokens that a query looks at, on average
    latent = heads * (hidden * (dim + rope) + 2 * dim * rank + dim * hidden) + hidden * (rank + rope)
    attended = heads * seen * (2 * rank + rope)
    features = heads * rank if heads * rank <= 8192 else heads * dim
    return {
        "source": 2 * every * (mlp + attention + heads * seen * 2 * dim),
        # all pairs of tokens: scores, and the overlap of heads; moments of keys and values; two eigenvalue problems
        "closed form": 2 * tokens * (attention + heads * _WINDOW * (dim + heads) + (2 * width) ** 2)
        + 20 * (2 * width) ** 3,
        "refit": 2 * tokens * (latent + attended + features * (features / 2 + hidden)) + 7 * features**3 / 3,
        "converted model": 2 * every * (mlp + latent + attended),
        "measuring": 2 * _MEASURED_TOKENS * (latent + attended),
    }


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the parts at one layer and at more, and what follows."""
    config = SHAPES[shape]
    rank, rope = widths_of(config)
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="xeco-bench-") as name:
        folder, deep, shallow = Path(name), Path(name) / "deep", Path(name) / "shallow"
        write_checkpoint(deep, config, options.layers_made)
        link_shallower(deep, shallow, config, 1)
        windows = -(-options.tokens // _WINDOW) + _MEASURED_TOKENS // _WINDOW
        ids = torch.randint(config["vocab_size"], (windows, _WINDOW), generator=torch.Generator().manual_seed(0))
        (folder / "tokens.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
        found = []
        for source in (shallow, deep):
            print(f"{shape}: {source.name}", file=sys.stderr, flush=True)
            write_tokenizer(source, config["vocab_size"])
            report = xeco_convert.convert(
                source,
                folder / "out",
                rank=rank,
                rope_dim=rope,
                calibration=str(folder / "tokens.json"),
                calibration_tokens=options.tokens,
            )
            found.append({part: report.timings[part]["cpu_seconds"] for part in _PARTS})
            shutil.rmtree(folder / "out")
    more = options.layers_made - 1
    layer = {part: max(0.0, found[1][part] - found[0][part]) / more for part in _PARTS}
    return {
        "layers": config["num_hidden_layers"],
        "widths": [rank, rope],
        "cpu_seconds_at_one_layer": found[0],
        "cpu_seconds_of_a_layer": layer,
        "counted_of_a_layer": counted(config, options.tokens),
        "extrapolated_cpu_seconds": sum(found[0].values()) + (config["num_hidden_layers"] - 1) * sum(layer.values()),
    }


def table(rows: dict[str, Any]) -> str:
    """A line for each part of each shape, and their sum with what is extrapolated."""
    lines: list[list[Any]] = []
    for shape, row in rows.items():
        seconds, operations = row["cpu_seconds_of_a_layer"], row["counted_of_a_layer"]
        total = {"all": (sum(seconds.values()), sum(operations.values()))}
        for part, (took, count) in ({part: (seconds[part], operations[part]) for part in _PARTS} | total).items():
            whole = f"{row['extrapolated_cpu_seconds'] / 60:.0f}" if part == "all" else ""
            speed = f"{count / took / 1e9:.0f}" if took > 0 else "–"
            lines.append([shape, part, f"{count / 1e12:.2f}", f"{took:.1f}", speed, whole])
    columns = ("shape", "part", "10¹² operations", "CPU s a layer", "10⁹ a second", "all layers, CPU minutes")
    return format_table(columns, lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=list(SHAPES), help="shapes [all]")
    parser.add_argument("--layers-made", type=int, default=2, help="layers of the deeper checkpoint [2]")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to calibrate on [4096]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--work-dir", type=Path, help="folder for checkpoints (5 GB), removed afterwards [temporary]")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if options.layers_made < 2:
        parser.error(f"--layers-made: expected at least 2, whose difference is a layer, found {options.layers_made}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    machine = machine_facts()
    rows = {shape: measure(shape, options) for shape in options.shape}
    print(f"{describe(machine)}; {options.tokens} tokens to calibrate on\n{table(rows)}")
    write_json(options.json, {"benchmark": "scale", "machine": machine, "tokens": options.tokens, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

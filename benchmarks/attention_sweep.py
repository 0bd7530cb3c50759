"""The sweep of bench_attention.py: decode steps over ranks, lengths and batches, against what the machine can do."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_peers import ABSORBED, IMPLEMENTATIONS, OURS, Case, Inputs
from reporting import describe, format_table, machine_facts, write_json
from timing import median_seconds

from xeco_convert.ops.extension import extension

RANKS = (16, 32, 64, 128, 256, 512)
TOKENS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 4, 16)
_MOST_BYTES = 2**29  # of cached rows


def measured_peaks(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second read by one pass over 256 MiB, and FLOP per second of a matrix product: the roofline."""
    block = torch.ones(2**26, dtype=torch.float32)
    square = torch.randn(2048, 2048).to(dtype)
    seconds = {"read": _best(block.sum), "product": _best(lambda: square @ square)}
    return block.nbytes / seconds["read"], 2 * 2048**3 / seconds["product"]


def _best(run: Any) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def sweep_cases(dtype: torch.dtype) -> list[Case]:
    """Every rank, length and batch whose cache is not larger than 512 MiB; rotary width a quarter of the rank, 16 to 64."""
    cases = [
        Case(dtype=dtype, batch=batch, tokens=tokens, rank=rank, rope=min(64, max(16, rank // 4)))
        for rank in RANKS
        for tokens in TOKENS
        for batch in BATCHES
    ]
    return [case for case in cases if case.cache_bytes <= _MOST_BYTES]


def run_sweep(options: argparse.Namespace) -> int:
    """Table, JSON and plot."""
    torch.set_num_threads(options.threads[0])
    machine = machine_facts() | {"cpu_level": extension().cpu_level()}
    points: list[dict[str, Any]] = []
    peaks = {}
    for dtype in (torch.bfloat16, torch.float32):
        measured = [(case, _seconds(case, options.repeats)) for case in sweep_cases(dtype)]
        read, product = measured_peaks(dtype)
        # torch's float32 product leaves some processors half used: what was reached is no more than can be reached
        peaks[str(dtype)] = read, max(product, *(case.flop / seconds[OURS] for case, seconds in measured))
        points += [_point(case, seconds, peaks[str(dtype)]) for case, seconds in measured]
    print(describe(machine), "")
    print(format_table(COLUMNS, [_cells(point) for point in points]))
    write_json(options.json, {"machine": machine, "peaks": peaks, "points": points})
    if options.plot is not None:
        plot(points, options.plot)
    return 0


def _seconds(case: Case, repeats: int) -> dict[str, float]:
    inputs = Inputs(case)
    runs = {name: partial(IMPLEMENTATIONS[name], inputs) for name in (OURS, *ABSORBED)}
    with torch.inference_mode():
        return median_seconds(runs, repeats)


def _point(case: Case, seconds: dict[str, float], peaks: tuple[float, float]) -> dict[str, Any]:
    bytes_per_second, flop_per_second = peaks
    roof = max(case.cache_bytes / bytes_per_second, case.flop / flop_per_second)
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.batch,
        "tokens": case.tokens,
        "rank": case.rank,
        "rope": case.rope,
        "seconds": seconds,
        "gflop_per_second": case.flop / seconds[OURS] / 1e9,
        "absorbed": min(seconds[name] for name in ABSORBED) / seconds[OURS],
        "of_roofline": roof / seconds[OURS],
    }


COLUMNS = ("dtype", "R + P", "T", "B", "ms", "GFLOP/s", "best absorbed torch", "of the roofline")


def _cells(point: dict[str, Any]) -> list[Any]:
    return [
        point["dtype"],
        f"{point['rank']} + {point['rope']}",
        point["tokens"],
        point["batch"],
        f"{1e3 * point['seconds'][OURS]:.3g}",
        f"{point['gflop_per_second']:.0f}",
        f"{point['absorbed']:.2f} x",
        f"{point['of_roofline']:.0%}",
    ]


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """Batch 1 over the cached length, a line for each rank. Above: GFLOP/s, with the roofline of each dtype (what memory
    bandwidth and matrix product, both measured, allow; or the fastest point where that is faster) dashed. Below: the
    speed-up over the best plain torch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row")
    for column, dtype in enumerate(("bfloat16", "float32")):
        speed, ratio = axes[0][column], axes[1][column]
        for rank in RANKS:
            line = [p for p in points if p["dtype"] == dtype and p["rank"] == rank and p["batch"] == 1]
            tokens = [p["tokens"] for p in line]
            (drawn,) = speed.plot(tokens, [p["gflop_per_second"] for p in line], marker="o", label=f"R {rank}")
            roof = [p["gflop_per_second"] / p["of_roofline"] for p in line]
            speed.plot(tokens, roof, linestyle="--", linewidth=0.8, color=drawn.get_color())
            ratio.plot(tokens, [p["absorbed"] for p in line], marker="o")
        speed.set(xscale="log", title=f"{dtype}, batch 1, 32 heads")
        ratio.axhline(1, color="grey", linewidth=0.8)
        ratio.set(yscale="log", xlabel="cached tokens")
    axes[0][0].set_ylabel("GFLOP/s (dashed: roofline)")
    axes[1][0].set_ylabel("speed-up over the best plain torch")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file)

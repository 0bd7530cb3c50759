"""How fast latent attention is on this GPU, beside its measured ceilings and torch's own attention in the same run.

    python benchmarks/bench_gpu_attention.py --json benchmarks/results/gpu_attention.json

Kernel times by CUDA events, the L2 cache flushed before each run, medians. Decode is given in GB/s of latents read once, the
forward pass in TFLOP/s of counted work. Exits with 1 where a bound of a case is missed or two implementations disagree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_attention_peers import (
    GpuCase,
    Layer,
    decode_decompressed,
    decode_fused,
    decode_paged,
    expanded_sdpa,
    flex,
    fused,
)
from gpu_facts import gpu_facts, smi
from reporting import format_table, machine_facts, write_json
from torch import Tensor

WIDTHS = ((128, 32), (256, 64), (512, 64))
DECODE = [
    GpuCase(batch=b, queries=1, tokens=t, rank=r, rope=p) for r, p in WIDTHS for b, t in ((64, 8192), (128, 32768))
]
DECOMPRESSED = GpuCase(batch=64, queries=1, tokens=8192, rank=128, rope=32)
FORWARD = GpuCase(batch=4, queries=4096, tokens=4096, rank=128, rope=32)
BOUNDS = {"decode": 0.70, "decompressed": 8.0, "forward": 0.35, "training": 1.0}


class Clock:
    """Medians of single runs between two events, each after the L2 cache was overwritten."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self._flush = torch.empty(
            4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda"
        )

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run on the device."""
        for _ in range(3):
            run()
        times = []
        for _ in range(self._repeats):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return statistics.median(times)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    from xeco_convert.ops.extension import kernel_obstacle

    obstacle = kernel_obstacle("cuda", torch.bfloat16)
    if obstacle:
        parser.error(f"{obstacle}: XECO_BUILD_DEVICE=1 python setup.py build_ext --inplace")
    clock = Clock(arguments.repeats)
    results: dict[str, Any] = {"machine": machine_facts() | gpu_facts(), "ceilings": ceilings(clock)}
    results["cases"] = [*decode_rows(clock, results["ceilings"]), *forward_rows(clock, results["ceilings"])]
    results["machine"]["clocks_after"] = smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    columns = ["case", "ms", "figure", "unit", "against", "share", "at least"]
    print(format_table(columns, [[row[column] for column in columns] for row in results["cases"]]))
    write_json(arguments.json, results)
    missed = [row["case"] for row in results["cases"] if row["at least"] and row["share"] < row["at least"]]
    print(f"missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def ceilings(clock: Clock) -> dict[str, float]:
    """What this GPU does at best: GB/s read and written by a copy, TFLOP/s of a bfloat16 product of random numbers."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = clock.seconds(lambda: left @ right)
    source = torch.randint(256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = clock.seconds(lambda: target.copy_(source))
    return {"copy_gb_per_second": 2 * 2**31 / copy / 1e9, "bf16_tflop_per_second": 2 * size**3 / product / 1e12}


def row(
    case: str, seconds: float, figure: float, unit: str, against: str, share: float, bound: float | None
) -> dict[str, Any]:
    """One line of the table."""
    return {
        "case": case,
        "ms": seconds * 1000,
        "figure": figure,
        "unit": unit,
        "against": against,
        "share": share,
        "at least": bound,
    }


@torch.no_grad()
def decode_rows(clock: Clock, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Contiguous and paged caches against a copy; one case against a decompressed cache."""
    rows = []
    for case in DECODE:
        layer = Layer(case)
        for name, run in ((case.name, decode_fused(layer)), (case.name + ", paged", decode_paged(layer))):
            seconds = clock.seconds(run)
            rate = case.cache_bytes / seconds / 1e9
            share = rate / ceiling["copy_gb_per_second"]
            rows.append(row(name, seconds, rate, "GB/s", "copy", share, BOUNDS["decode"]))
        torch.cuda.empty_cache()
    layer = Layer(DECOMPRESSED)
    ours, theirs = decode_fused(layer), decode_decompressed(layer)
    agree(DECOMPRESSED.name, layer.output(ours()), theirs()[..., : DECOMPRESSED.nope].transpose(1, 2))
    seconds, other = clock.seconds(ours), clock.seconds(theirs)
    rows.append(
        row(
            DECOMPRESSED.name, seconds, other / seconds, "x", f"decompressed K/V in flash attention, {other * 1000:.3g} ms",
            other / seconds, BOUNDS["decompressed"],
        )
    )  # fmt: skip
    torch.cuda.empty_cache()
    return rows


def forward_rows(clock: Clock, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """The op alone against a matrix product; a training step of a layer's attention against torch's two ways."""
    from xeco_convert.ops import latent_attention

    with torch.no_grad():
        layer = Layer(FORWARD)
        q_latent = layer.q_latent()
        seconds = clock.seconds(
            lambda: latent_attention(q_latent, layer.q_rope, layer.c_kv, layer.k_rope, softmax_scale=FORWARD.scale)
        )
    rate = FORWARD.flop / seconds / 1e12
    share = rate / ceiling["bf16_tflop_per_second"]
    rows = [row(FORWARD.name, seconds, rate, "TFLOP/s", "bf16 matmul", share, BOUNDS["forward"])]
    layer = Layer(FORWARD, training=True)
    implementations = {"fused": fused, "expanded K/V in flash attention": expanded_sdpa, "FlexAttention": flex}
    outputs = {name: run(layer).detach() for name, run in implementations.items()}
    for name, output in outputs.items():
        agree(f"{FORWARD.name}, {name}", outputs["fused"], output)
    times = {name: clock.seconds(training_step(run, layer)) for name, run in implementations.items()}
    best = min((name for name in times if name != "fused"), key=lambda name: times[name])
    against = ", ".join(f"{name} {seconds * 1000:.3g} ms" for name, seconds in times.items() if name != "fused")
    ratio = times[best] / times["fused"]
    name = FORWARD.name.replace("forward", "forward + backward")
    return [*rows, row(name, times["fused"], ratio, "x", against, ratio, BOUNDS["training"])]


def training_step(run: Callable[[Layer], Tensor], layer: Layer) -> Callable[[], Any]:
    """Forward and gradients of everything."""
    gradient = torch.randn_like(run(layer))
    return lambda: torch.autograd.grad(run(layer), layer.leaves, gradient)


def agree(case: str, one: Tensor, other: Tensor) -> None:
    """Exits where they are not the same function."""
    error = float((one.float() - other.float()).norm() / other.float().norm())
    if not error < 0.03:
        sys.exit(f"{case}: implementations disagree: relative error {error:.3g}")


if __name__ == "__main__":
    sys.exit(main())

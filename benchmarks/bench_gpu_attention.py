"""How fast latent attention is on this GPU, beside its measured ceilings and torch's own attention in the same run.

    python benchmarks/bench_gpu_attention.py --json benchmarks/results/gpu_attention.json

Kernel times by CUDA events, the L2 cache flushed before each run, medians. Decode is given in GB/s of latents read once, the
forward pass in TFLOP/s of counted work. Exits with 1 where a bound of a case is missed or two implementations disagree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_attention_peers import (
    GpuCase,
    Layer,
    decode_decompressed,
    decode_fused,
    decode_packed,
    decode_paged,
    expanded_sdpa,
    flex,
    fused,
)
from gpu_facts import gpu_facts, refuse_without_kernels, smi
from reporting import format_table, machine_facts, write_json
from torch import Tensor

from xeco_convert.ops import latent_attention

WIDTHS = ((128, 32), (256, 64), (512, 64))
DECODE = [
    GpuCase(batch=b, queries=1, tokens=t, rank=r, rope=p) for r, p in WIDTHS for b, t in ((64, 8192), (128, 32768))
]
DECOMPRESSED = GpuCase(batch=64, queries=1, tokens=8192, rank=128, rope=32)
FORWARD = GpuCase(batch=4, queries=4096, tokens=4096, rank=128, rope=32)
CODES = ((8, 8), (4, 8), (4, 4), (3, 6))  # bits of latents and of rotary keys
BOUNDS = {"decode": 0.70, "codes": 1.0, "decompressed": 8.0, "forward": 0.35, "training": 1.0}


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
    refuse_without_kernels(parser)
    clock = Clock(arguments.repeats)
    results: dict[str, Any] = {"machine": machine_facts() | gpu_facts(), "cases": [], "failures": []}
    results["ceilings"] = ceilings(clock)
    for measure in (decode_rows, code_rows, decompressed_rows, forward_rows, training_rows):
        collect(measure, results, clock, results["ceilings"])
        write_json(arguments.json, results)  # what is measured is kept, whatever comes next
    results["machine"]["clocks_after"] = smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    write_json(arguments.json, results)
    columns = ["case", "ms", "figure", "unit", "against", "share", "at least"]
    print(format_table(columns, [[row[column] for column in columns] for row in results["cases"]]))
    missed = [row["case"] for row in results["cases"] if row["share"] < row["at least"]]
    print(f"missed: {', '.join(missed) or 'none'}")
    print(f"failed: {'; '.join(results['failures']) or 'none'}")
    return 1 if missed or results["failures"] else 0


def collect(measure: Callable[..., Iterator[dict[str, Any]]], results: dict[str, Any], *arguments: Any) -> None:
    """Add the lines of one measurement. What goes wrong in it is written down, and the next one is tried: a GPU is scarce."""
    try:
        for line in measure(*arguments):
            results["cases"].append(line)
    except Exception as error:
        traceback.print_exc()
        results["failures"].append(f"{measure.__name__}: {type(error).__name__}: {error}")


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
    case: str, seconds: float, figure: float, unit: str, against: str, share: float, bound: float
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
def decode_rows(clock: Clock, ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Contiguous and paged caches against a copy."""
    for case in DECODE:
        layer = Layer(case)
        for name, prepare in ((case.name, decode_fused), (case.name + ", paged", decode_paged)):
            seconds = clock.seconds(prepare(layer))
            rate = case.cache_bytes / seconds / 1e9
            share = rate / ceiling["copy_gb_per_second"]
            yield row(name, seconds, rate, "GB/s", "copy", share, BOUNDS["decode"])
            torch.cuda.empty_cache()


@torch.no_grad()
def code_rows(clock: Clock, ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Caches in 8 to 3 bits against one in bfloat16, and what they read in a second."""
    for case in DECODE:
        layer = Layer(case)
        of_wide = clock.seconds(decode_fused(layer))
        for bits in CODES:
            ours, same = decode_packed(layer, bits)
            check_agreement(f"{case.name}, codes", ours(), same())
            seconds = clock.seconds(ours)
            rate = case.code_bytes(bits) / seconds / 1e9
            of_copy = rate / ceiling["copy_gb_per_second"]
            against = f"bfloat16 rows, {of_wide * 1000:.3g} ms; {of_copy:.0%} of a copy"
            name = f"{case.name}, {bits[0]}+{bits[1]} bits"
            yield row(name, seconds, rate, "GB/s", against, of_wide / seconds, BOUNDS["codes"])
            del ours, same
            torch.cuda.empty_cache()


@torch.no_grad()
def decompressed_rows(clock: Clock, _: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Decode against a cache of keys and values of every head."""
    layer = Layer(DECOMPRESSED)
    ours, theirs = decode_fused(layer), decode_decompressed(layer)
    check_agreement(DECOMPRESSED.name, layer.output(ours()), theirs()[..., : DECOMPRESSED.nope].transpose(1, 2))
    seconds, other = clock.seconds(ours), clock.seconds(theirs)
    against = f"decompressed K/V in flash attention, {other * 1000:.3g} ms"
    yield row(DECOMPRESSED.name, seconds, other / seconds, "x", against, other / seconds, BOUNDS["decompressed"])


@torch.no_grad()
def forward_rows(clock: Clock, ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The op alone against a matrix product."""
    layer = Layer(FORWARD)
    q_latent = layer.q_latent()
    seconds = clock.seconds(
        lambda: latent_attention(q_latent, layer.q_rope, layer.c_kv, layer.k_rope, softmax_scale=FORWARD.scale)
    )
    rate = FORWARD.flop / seconds / 1e12
    share = rate / ceiling["bf16_tflop_per_second"]
    yield row(FORWARD.name, seconds, rate, "TFLOP/s", "bf16 matmul", share, BOUNDS["forward"])


def training_rows(clock: Clock, _: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A training step of a layer's attention against torch's two ways, of which one may not run on this GPU."""
    layer = Layer(FORWARD, training=True)
    ours = fused(layer).detach()
    seconds = clock.seconds(training_step(fused, layer))
    times, words = [], []
    for name, peer in (("expanded K/V in flash attention", expanded_sdpa), ("FlexAttention", flex)):
        try:
            output = peer(layer).detach()
            times.append(clock.seconds(training_step(peer, layer)))
        except RuntimeError as error:  # no kernel, or no room for one, in torch or Triton
            traceback.print_exc()
            words.append(f"{name} does not run ({type(error).__name__})")
            continue
        check_agreement(f"{FORWARD.name}, {name}", ours, output)
        words.append(f"{name} {times[-1] * 1000:.3g} ms")
    if not times:
        raise RuntimeError(", ".join(words))
    name, ratio = FORWARD.name.replace("forward", "forward + backward"), min(times) / seconds
    yield row(name, seconds, ratio, "x", ", ".join(words), ratio, BOUNDS["training"])


def training_step(run: Callable[[Layer], Tensor], layer: Layer) -> Callable[[], Any]:
    """Forward and gradients of everything."""
    gradient = torch.randn_like(run(layer))
    return lambda: torch.autograd.grad(run(layer), layer.leaves, gradient)


def check_agreement(case: str, one: Tensor, other: Tensor) -> None:
    """Raises `ValueError` where they are not the same function."""
    error = float((one.float() - other.float()).norm() / other.float().norm())
    if not error < 0.03:
        raise ValueError(f"{case}: implementations disagree: relative error {error:.3g}")


if __name__ == "__main__":
    sys.exit(main())

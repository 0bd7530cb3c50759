"""When should a GPU take the fused kernels for prefill and training? Their speed beside attention over expanded keys and values.

    python benchmarks/bench_gpu_choice.py --json benchmarks/results/gpu_choice.json

Times of a layer's attention by CUDA events, medians, and from them operations per second of the kernels relative to those of
torch's flash attention over expanded keys and values, by the counts of xeco_convert/ops/choice.py: its FUSED_SPEED.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_gpu_attention import Clock, training_step
from gpu_attention_peers import GpuCase, Layer, absorbed_sdpa, expanded_sdpa, fused
from gpu_facts import gpu_facts, refuse_without_kernels
from reporting import format_table, machine_facts, write_json
from torch import Tensor

from xeco_convert.ops.choice import AttentionCall, counted_operations

WIDTHS = ((128, 32), (128, 64), (256, 64), (512, 64))
LENGTHS = ((4, 512), (4, 2048), (1, 8192), (1, 16384))  # batch, tokens
CASES = [GpuCase(batch=b, queries=t, tokens=t, rank=r, rope=p) for r, p in WIDTHS for b, t in LENGTHS]
WAYS: dict[str, Callable[[Layer], Tensor]] = {
    "fused": fused,
    "expanded": expanded_sdpa,
    "absorbed": absorbed_sdpa,
}


def compare(case: GpuCase, *, training: bool, clock: Any, device: str = "cuda") -> dict[str, Any]:
    """Milliseconds of each way, None where torch has no kernel or room for it, and the relative speed of the kernels."""
    layer = Layer(case, training=training, device=device)
    milliseconds = {name: _milliseconds(way, layer, training, clock) for name, way in WAYS.items()}
    call = AttentionCall(
        num_queries=case.queries,
        num_tokens=case.tokens,
        kv_lora_rank=case.rank,
        qk_nope_head_dim=case.nope,
        qk_rope_head_dim=case.rope,
        v_head_dim=case.nope,
        needs_gradients=training,
    )
    counts = counted_operations(call)
    ours, theirs = milliseconds["fused"], milliseconds["expanded"]
    speed = None if ours is None or theirs is None else counts["fused"] / ours / (counts["expanded"] / theirs)
    return {"case": case.name, "training": training, "ms": milliseconds, "speed": speed}


def _milliseconds(way: Callable[[Layer], Tensor], layer: Layer, training: bool, clock: Any) -> float | None:
    try:
        if training:
            return 1000 * float(clock.seconds(training_step(way, layer)))
        with torch.no_grad():
            return 1000 * float(clock.seconds(lambda: way(layer)))
    except RuntimeError:
        return None


def measure(clock: Any) -> Iterator[dict[str, Any]]:
    """Every case in both directions."""
    for case in CASES:
        for training in (False, True):
            yield compare(case, training=training, clock=clock)
            torch.cuda.empty_cache()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    arguments = parser.parse_args()
    refuse_without_kernels(parser)
    results: dict[str, Any] = {"machine": machine_facts() | gpu_facts(), "cases": []}
    for row in measure(Clock(arguments.repeats)):
        results["cases"].append(row)
        write_json(arguments.json, results)  # what is measured is kept, whatever comes next
    lines = [
        [row["case"], "training" if row["training"] else "forward", *row["ms"].values(), row["speed"]]
        for row in results["cases"]
    ]
    print(format_table(["case", "pass", *(f"{name}, ms" for name in WAYS), "speed of fused"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

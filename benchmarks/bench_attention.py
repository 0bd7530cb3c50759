"""How fast latent attention is on this CPU, beside plain torch in the same run.

    python benchmarks/bench_attention.py cases                  decode, forward, forward + backward
    python benchmarks/bench_attention.py sweep --plot FILE.svg  decode over ranks, lengths and batches, with its roofline
    python benchmarks/bench_attention.py generate               tokens per second of converted models and their sources

Medians of interleaved runs. A time on a shared CPU means little, the ratio of two of the same run a lot. "at peak" is the
ratio that would be reached at the speed of torch's own matrix product: where torch's attention is close to it already, no
kernel can be much faster. The bounds were set on a processor with AMX; there `cases` exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_generate import run_generate
from attention_peers import ABSORBED, DECOMPRESSED, IMPLEMENTATIONS, OURS, Case, Inputs
from attention_sweep import measured_peaks, run_sweep
from reporting import describe, format_table, machine_facts, write_json
from timing import median_seconds

from xeco_convert.ops.extension import extension

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Ratios that were asked for: of time to the best absorbed form in plain torch and to the decompressed one, of memory
    to scores that are stored (`absorbed bmm`)."""

    absorbed: float
    decompressed: float | None = None
    memory: float | None = None


def decode_cases() -> list[tuple[str, Case, Bound]]:
    """A decode step over 4096 tokens."""
    bounds = {
        torch.bfloat16: Bound(absorbed=2.5, decompressed=10),
        torch.float32: Bound(absorbed=1.3, decompressed=10),
    }
    return [
        (f"decode {_NAMES[dtype]}, B {batch}, T 4096", Case(dtype=dtype, batch=batch), bound)
        for dtype, bound in bounds.items()
        for batch in (1, 4)
    ]


def forward_cases() -> list[tuple[str, Case]]:
    """A causal pass over 1024 tokens."""
    return [
        (f"{_NAMES[dtype]}, Q = T = 1024", Case(dtype=dtype, queries=1024, tokens=1024))
        for dtype in (torch.bfloat16, torch.float32)
    ]


def forward_and_backward(name: str, inputs: Inputs) -> Callable[[], None]:
    """One pass with gradients of queries and rows."""

    def run() -> None:
        out = IMPLEMENTATIONS[name](inputs)
        out.backward(torch.ones_like(out))
        inputs.forget_gradients()

    return run


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the resident memory of this process rises above where it stands."""
    run()  # what is allocated once is not counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that the first run freed would serve the second unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: what was measured and what was asked for."""

    case: str
    threads: int
    seconds: Mapping[str, float]
    gflop_per_second: float
    bound: Bound
    peak_gflop_per_second: float
    memory_share: Mapping[str, float] | None = None

    @property
    def absorbed(self) -> float:
        """Ratio to the best absorbed form in plain torch."""
        return min(self.seconds[name] for name in ABSORBED) / self.seconds[OURS]

    @property
    def reachable(self) -> float:
        """That ratio if this package ran at the speed of torch's matrix product: what the processor leaves to gain."""
        return self.absorbed * self.peak_gflop_per_second / self.gflop_per_second

    @property
    def decompressed(self) -> float | None:
        return None if DECOMPRESSED not in self.seconds else self.seconds[DECOMPRESSED] / self.seconds[OURS]

    @property
    def holds(self) -> bool:
        """Whether every ratio that was asked for is reached."""
        fast = self.absorbed >= self.bound.absorbed
        if self.bound.decompressed is not None:
            fast = fast and self.decompressed is not None and self.decompressed >= self.bound.decompressed
        if self.bound.memory is not None:
            fast = fast and self.memory_share is not None and self.memory_share["absorbed bmm"] <= self.bound.memory
        return fast

    def cells(self) -> list[Any]:
        wanted = f"{self.bound.absorbed:g} x"
        if self.bound.decompressed is not None:
            wanted += f", {self.bound.decompressed:g} x"
        if self.bound.memory is not None:
            wanted += f", memory {self.bound.memory:g} x"
        return [
            self.case,
            self.threads,
            f"{1e3 * self.seconds[OURS]:.3g}",
            f"{self.gflop_per_second:.0f}",
            f"{self.absorbed:.2f} x",
            f"{self.reachable:.2f} x",
            None if self.decompressed is None else f"{self.decompressed:.1f} x",
            None if self.memory_share is None else " / ".join(f"{share:.2f} x" for share in self.memory_share.values()),
            wanted,
            "yes" if self.holds else "no",
        ]


COLUMNS = (
    "case (H 32, R 128, P 32)",
    "threads",
    "ms",
    "GFLOP/s",
    "over absorbed torch",
    "at peak",
    "over decompressed",
    "peak memory (of sdpa / of bmm)",
    "asked for",
    "holds",
)


def measure_cases(threads: int, repeats: int) -> list[Row]:
    """All cases with this many threads."""
    torch.set_num_threads(threads)
    measure = _Measure(threads=threads, repeats=repeats)
    rows = [measure.inference(name, case, bound, 5 * repeats) for name, case, bound in decode_cases()]
    for name, case in forward_cases():
        rows.append(measure.inference(f"forward {name}", case, Bound(absorbed=1.5), repeats))
    return rows + [measure.training(f"forward + backward {name}", case) for name, case in forward_cases()]


class _Measure:
    """Rows with one number of threads, and the speed of torch's matrix product with as many."""

    def __init__(self, threads: int, repeats: int) -> None:
        self._threads = threads
        self._repeats = repeats
        self._peaks = {dtype: measured_peaks(dtype)[1] / 1e9 for dtype in _NAMES}

    def inference(self, name: str, case: Case, bound: Bound, repeats: int) -> Row:
        inputs = Inputs(case).with_keys()
        with torch.inference_mode():
            seconds = median_seconds({key: partial(run, inputs) for key, run in IMPLEMENTATIONS.items()}, repeats)
        return self._row(name, case, seconds, case.flop, bound)

    def training(self, name: str, case: Case) -> Row:
        inputs = Inputs(case, training=True)
        runs = {key: forward_and_backward(key, inputs) for key in (OURS, *ABSORBED)}
        seconds = median_seconds(runs, self._repeats)
        memory = {key: peak_bytes(run) for key, run in runs.items()}
        forward = 2 * case.rank + case.rope
        work = case.flop * (forward + _backward_depth(case)) / forward
        row = self._row(name, case, seconds, work, Bound(absorbed=1.3, memory=0.25))
        return replace(row, memory_share={key: memory[OURS] / memory[key] for key in ABSORBED})

    def _row(self, name: str, case: Case, seconds: dict[str, float], flop: float, bound: Bound) -> Row:
        return Row(
            case=name,
            threads=self._threads,
            seconds=seconds,
            gflop_per_second=flop / seconds[OURS] / 1e9,
            bound=bound,
            peak_gflop_per_second=self._peaks[case.dtype],
        )


def _backward_depth(case: Case) -> int:
    """Products of the backward pass, in the unit in which the forward pass is 2R + P: S, dP, dq, dk and dv."""
    return 3 * (case.rank + case.rope) + 2 * case.rank


def run_cases(options: argparse.Namespace) -> int:
    """The table of the cases. Returns the exit code."""
    machine = machine_facts() | {"cpu_level": _level()}
    rows = [row for threads in options.threads for row in measure_cases(threads, options.repeats)]
    print(describe(machine), f"kernels: {machine['cpu_level']}", "", sep="\n")
    print(format_table(COLUMNS, [row.cells() for row in rows]))
    found = [
        {"case": row.case, "threads": row.threads, "seconds": dict(row.seconds), "absorbed": row.absorbed}
        | {
            "decompressed": row.decompressed,
            "memory_share": row.memory_share and dict(row.memory_share),
            "holds": row.holds,
        }
        | {"gflop_per_second": row.gflop_per_second, "peak_gflop_per_second": row.peak_gflop_per_second}
        for row in rows
    ]
    write_json(options.json, {"machine": machine, "rows": found})
    return 0 if all(row.holds for row in rows) or machine["cpu_level"] != "amx" else 1


def _level() -> str:
    module = extension()
    if module is None:
        raise SystemExit("bench_attention: the extension is not built here; pip install . with a C++ compiler first.")
    return str(module.cpu_level())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cases", "sweep", "generate"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="sweep: where the plot goes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192], help="generate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    _level()
    return {"cases": run_cases, "sweep": run_sweep, "generate": run_generate}[options.part](options)


if __name__ == "__main__":
    raise SystemExit(main())

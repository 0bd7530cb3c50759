"""How good are conversions of a real model? Every way to convert at 75, 50, 25 and 12.5 % of the KV cache, on wikitext-2.

    python benchmarks/bench_real.py --checkpoint real-output/smollm2 --text FILE --calibration FILE --json FILE
    python benchmarks/bench_real.py ... --rows '50%/transmla/*' '50%/calibrated/*'    # some rows
    python benchmarks/bench_real.py --list

The whole table takes hours: every row goes into the file of --json as soon as it is measured, and rows that stand there already
are not measured again (--again does). Ways to convert are those of bench_fidelity.py: paper, transmla (the peer, written from its
description), calibrated on text at a budget and at one pair of widths, the budget spent on codes of few bits ("auto bits"),
refined, and sampled (on samples of the source) with several seeds. Exits with 1 where a figure is above the one that must be
reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES
from bench_fidelity import by_baseline, by_package, load
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from xeco_convert.errors import OptionError, XecoError
from xeco_convert.evaluate import measure_fidelity, token_windows

# Rank + rope of the ways that take no budget, by share of the cache of SmolLM2-135M (384 numbers per token and layer).
PAIRS: Mapping[str, tuple[str, ...]] = {
    "75%": ("224+64",),
    "50%": ("128+64",),
    "25%": ("64+32", "32+64"),
    "12.5%": ("32+16", "16+32"),
}
SEEDS = (1, 2)  # beside 0, at 50 %
# KL on the measuring windows that must be reached, by share and way; of the gap to TransMLA's method, the largest share.
KL_BOUNDS = {("50%", "calibrated"): 0.10, ("50%", "refined"): 0.05, ("25%", "refined"): 0.35}
GAP_BOUNDS = {("50%", "calibrated"): 1 / 3.5, ("25%", "calibrated"): 1 / 3.5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a way to convert, at a size (rank + rope or a share) that takes `share` of the cache, numbers in `bits`."""

    share: str
    method: str
    size: str
    seed: int = 0
    bits: str = "16"

    @property
    def name(self) -> str:
        """As --rows and the results call it."""
        seed = f"/seed{self.seed}" if self.seed else ""
        bits = f"/{self.bits}-bits" if self.bits != "16" else ""
        return f"{self.share}/{self.method}/{self.size}{bits}{seed}"

    @property
    def fields(self) -> dict[str, Any]:
        """Options of the conversion beside its size."""
        return {"seed": self.seed} | ({"cache_bits": self.bits} if self.bits != "16" else {})


def all_cases() -> list[Case]:
    """The whole table, quick rows first."""
    cases = [
        Case(share=share, method=method, size=pair)
        for method in ("paper", "transmla")
        for share, pairs in PAIRS.items()
        for pair in pairs
    ]
    for share, pairs in PAIRS.items():
        cases += [Case(share=share, method="calibrated", size=size) for size in (*pairs, share)]
        cases += [Case(share=share, method=method, size=share) for method in ("sampled", "refined")]
        cases.append(Case(share=share, method="calibrated", size=share, bits="auto"))
    cases.append(Case(share="50%", method="refined", size="128+64"))
    cases += [Case(share="50%", method="sampled", size="50%", seed=seed) for seed in SEEDS]
    cases += [Case(share="50%", method="refined", size="50%", seed=seed) for seed in SEEDS]
    return cases


def select(cases: Sequence[Case], patterns: Sequence[str] | None) -> list[Case]:
    """The cases that a pattern names. Raises `OptionError` for a pattern that names none."""
    for pattern in patterns or ():
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise OptionError(f"--rows: no row is called {pattern!r}; --list shows their names.")
    return [case for case in cases if patterns is None or any(fnmatchcase(case.name, each) for each in patterns)]


def measure(case: Case, source: Any, windows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Convert, compare, forget: the row as JSON types, with the machine that it was measured on."""
    machine = machine_facts()
    options.fields = case.fields
    if case.method == "refined" and options.refine_minutes:
        options.fields["refine_minutes"] = options.refine_minutes
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        convert, before = (by_baseline if case.method in BASELINES else by_package), time.process_time()
        arguments = (case.method, case.size, options.calibration_tokens, options, Path(folder))
        model, facts = convert(source, *arguments) if convert is by_baseline else convert(*arguments)
        cpu_seconds = time.process_time() - before
        fidelity = measure_fidelity(source, model, windows)
    return {**asdict(case), **facts, "cpu_seconds": cpu_seconds, "fidelity": fidelity.to_dict(), "machine": machine}


def peer_gap(rows: Mapping[str, dict[str, Any]], share: str) -> float | None:
    """The smallest gap of TransMLA's method at a share of the cache, in nats."""
    gaps = [row["fidelity"]["gap"] for row in rows.values() if (row["method"], row["share"]) == ("transmla", share)]
    return min(gaps, default=None)


COLUMNS = ("KV", "way", "seed", "rank + rope", "perplexity", "gap (nats)", "of TransMLA's", "KL (nats)", "top-1")
COLUMNS += ("convert (s)", "CPU (s)", "commit")


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """All rows measured so far, in the order of the whole table, the source first."""
    order = {case.name: number for number, case in enumerate(all_cases())}
    lines: list[list[Any]] = []
    for name in sorted(rows, key=lambda name: (list(PAIRS).index(rows[name]["share"]), order.get(name, len(order)))):
        row, peer = rows[name], peer_gap(rows, rows[name]["share"])
        fidelity = row["fidelity"]
        if not lines:
            lines.append(["100%", "source", None, None, fidelity["perplexity_source"], *[None] * (len(COLUMNS) - 5)])
        of_peer = None if not peer or row["method"] == "transmla" else f"{fidelity['gap'] / peer:.3f}"
        what = row["method"] + (" (budget)" if "%" in row["size"] and row["method"] == "calibrated" else "")
        what += "" if row.get("bits", "16") == "16" else f", {row['bits']} bits"
        values = [f"{row['kv_share']:.1%}", what, row["seed"], row["widths"], fidelity["perplexity"]]
        values += [f"{fidelity['gap']:.4f}", of_peer, f"{fidelity['kl']:.4f}", f"{fidelity['top1']:.1%}"]
        values += [f"{row['conversion_seconds']:.0f}", f"{row['cpu_seconds']:.0f}", row["machine"]["commit"]]
        lines.append(values)
    return format_table(COLUMNS, lines)


def misses(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """A sentence for every row above a figure that must be reached; a row at one pair of widths is not held to it."""
    sentences = []
    for name, row in rows.items():
        if row["size"] != row["share"]:
            continue
        key, fidelity, peer = (row["share"], row["method"]), row["fidelity"], peer_gap(rows, row["share"])
        if key in KL_BOUNDS and not fidelity["kl"] <= KL_BOUNDS[key]:
            sentences.append(f"{name}: KL {fidelity['kl']:.4f}, expected at most {KL_BOUNDS[key]}")
        if key in GAP_BOUNDS and peer and not fidelity["gap"] <= peer * GAP_BOUNDS[key]:
            sentences.append(
                f"{name}: {fidelity['gap'] / peer:.3f} of the gap of TransMLA's method, expected {GAP_BOUNDS[key]:.3f}"
            )
    return sentences


def read_rows(file: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run. Raises `OptionError` where it was made with other settings."""
    if file is None or not file.is_file():
        return {}
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        rows, found = earlier["rows"], earlier["settings"]
    except (ValueError, KeyError, TypeError):
        raise OptionError(f"--json: {file}: expected results of this benchmark, found another file.") from None
    for key, value in settings.items():
        if found.get(key) != value:
            raise OptionError(
                f"--json: {file} has rows with {key} {found.get(key)!r}, expected {value!r}; choose another file."
            )
    return dict(rows)


def read_text(file: Path) -> str:
    """The measuring text. Raises `OptionError`."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text: {file}: expected a text in UTF-8 ({error}); choose another file.") from None


def run(options: argparse.Namespace) -> int:
    """Measure the rows that are missing, write each when it is there, print the table; the exit code."""
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    settings = {name: getattr(options, name) for name in ("window", "num_windows", "calibration_tokens")}
    settings |= {name: getattr(options, name).name for name in ("checkpoint", "text", "calibration")}
    rows = read_rows(options.json, settings)
    cases = [case for case in select(all_cases(), options.rows) if options.again or case.name not in rows]
    if cases:
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, local_files_only=True)
        windows = token_windows(read_text(options.text), tokenizer, options.window, options.num_windows)
        source = load(options.checkpoint, "cpu")
    for case in cases:
        rows[case.name] = measure(case, source, windows, options)
        write_json(options.json, {"benchmark": "real", "settings": settings, "rows": rows})
        fidelity = rows[case.name]["fidelity"]
        print(
            f"{case.name}: perplexity {fidelity['perplexity']:.4g}, KL {fidelity['kl']:.4f}, "
            f"{rows[case.name]['conversion_seconds']:.0f} s",
            flush=True,
        )
    print(
        f"{options.checkpoint}: {options.num_windows} windows of {options.window} tokens; {describe(machine_facts())}"
    )
    print(table(rows))
    wrong = misses(rows)
    for sentence in wrong:
        print(f"not as expected: {sentence}")
    return 1 if wrong else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what the shared functions of bench_fidelity.py read besides is set here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of the source: the one that `make real` makes, or any")
    parser.add_argument("--text", type=Path, help="text that measures, taken raw")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="tokens to calibrate on [16384]")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window [1024]")
    parser.add_argument("--num-windows", type=int, default=12, help="windows taken [12]")
    parser.add_argument("--refine-minutes", type=float, default=8, help="refined: time of the regressions, 0: any [8]")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="rows to measure, as '50%%/*' [all]")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--again", action="store_true", help="measure rows again that stand in the file already")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--work-dir", type=Path, help="folder for the converted models, removed afterwards [temporary]")
    parser.add_argument("--json", type=Path, help="the results, kept after every row")
    options = parser.parse_args(arguments)
    if not options.list and None in (options.checkpoint, options.text, options.calibration):
        parser.error("give --checkpoint, --text and --calibration")
    options.device, options.calibration_part, options.attended = "cpu", ":", True
    options.refine_steps = None
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; a foreseen failure is one sentence."""
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(case.name for case in all_cases()))
        return 0
    try:
        return run(options)
    except XecoError as error:
        print(f"bench_real: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

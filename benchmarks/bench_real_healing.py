"""What healing gives back of a real model, after more and more tokens: wikitext-2, zero-shot tasks, long texts.

    python benchmarks/bench_real_healing.py --checkpoint real-output/smollm2 --calibration wikitext2_valid.txt \\
        --data healing.jsonl --text wikitext2_test.txt --tasks FOLDER --rows '25%/calibrated/64+32' --json FILE

Rows are those of bench_real.py: a way to convert at a size. Each is converted once and healed by `xeco-distill` for every number
of --tokens; 0 is the conversion alone. Every point goes into the file of --json as soon as it is measured, and is not measured
again. --at-once makes several rows side by side, each in a process of its own: on a GPU that has room for them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES
from bench_fidelity import by_baseline, by_package, load
from bench_real import Case, all_cases, read_text, select
from filelock import FileLock
from reporting import describe, format_table, machine_facts, write_json
from task_scores import score_folder
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from xeco_convert.errors import XecoError
from xeco_convert.evaluate import measure_fidelity, token_windows

TOKENS = (0, 50_000, 200_000, 1_000_000, 2_000_000)
POSITIONS = (0, 512, 1024, 2048, 4096, 8192)


def run_row(case: Case, options: argparse.Namespace) -> str | None:
    """Convert, heal, measure; a sentence where that fails. In a process of its own where several run."""
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    folder = options.work_dir / case.name.replace("/", "_").replace("%", "")
    try:
        for tokens in options.tokens:
            if not options.again and has_point(options.json, case.name, tokens):
                continue
            facts = converted(case, options, folder)
            point = {"tokens": tokens, **healed(folder / "converted", tokens, options)}
            add_point(options.json, case, facts, point)
            print(f"{case.name}, {tokens} tokens: {words(point)}", flush=True)
    except XecoError as error:
        return f"{case.name}: {error}"
    return None


def converted(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The facts of the conversion in FOLDER/converted, which is made where it is missing."""
    kept = folder / "facts.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = argparse.Namespace(**{**vars(options), "fields": options.fields | case.fields})
    arguments = (case.method, case.size, options.calibration_tokens, options, folder)
    if case.method in BASELINES:
        source = load(options.checkpoint, options.device)
        model, facts = by_baseline(source, *arguments)
        model.save_pretrained(folder / "converted")
        AutoTokenizer.from_pretrained(options.checkpoint).save_pretrained(folder / "converted")
    else:
        _, facts = by_package(*arguments)
    write_json(kept, facts)
    return facts


def healed(source: Path, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a copy of a conversion, healed on so many tokens."""
    folder, started = source, time.monotonic()
    if tokens:
        from xeco_distill.cli.heal import distill_command

        folder = source.with_name(f"healed-{tokens}")
        command = [str(source), "--output", str(folder), "--overwrite", "--restart", "--work-dir", f"{folder}.work"]
        command += ["--data", str(options.data), "--teacher", str(options.checkpoint), "--device", options.device]
        command += ["--budget-tokens", str(tokens), "--quiet", *options.heal]
        distill_command.main(args=command, prog_name="xeco-distill", standalone_mode=False)
    seconds = time.monotonic() - started if tokens else 0.0
    figures = {"heal_seconds": seconds, **measure(folder, options, with_tasks=tokens >= options.score_from)}
    if tokens:
        shutil.rmtree(folder)
    return figures


def measure(folder: Path, options: argparse.Namespace, *, with_tasks: bool = True) -> dict[str, Any]:
    """wikitext-2 beside the source, the tasks, and perplexity by position."""
    source, model = (load(each, options.device) for each in (options.checkpoint, folder))
    tokenizer, text = AutoTokenizer.from_pretrained(options.checkpoint), read_text(options.text)
    windows = token_windows(text, tokenizer, options.window, options.num_windows)
    figures: dict[str, Any] = {"fidelity": measure_fidelity(source, model, windows).to_dict()}
    if options.tasks is not None and with_tasks:
        figures |= score_folder(model, tokenizer, options.tasks, options.limit)
    if options.long_windows:
        windows = token_windows(text, tokenizer, POSITIONS[-1], options.long_windows)
        figures["perplexity_by_position"] = perplexity_by_position(model, windows)
    return figures


@torch.no_grad()
def perplexity_by_position(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Of windows [W, 8192], between the positions of `POSITIONS`."""
    losses, device = torch.zeros(windows.shape[1] - 1, dtype=torch.float64), next(model.parameters()).device
    for window in windows:
        hidden = model.base_model(window[None].to(device), use_cache=False).last_hidden_state[0, :-1]
        parts = zip(hidden.split(1024), window[1:].to(device).split(1024), strict=True)
        head = model.get_output_embeddings()
        found = [functional.cross_entropy(head(part).float(), ids, reduction="none") for part, ids in parts]
        losses += torch.cat(found).double().cpu() / windows.shape[0]
    return {f"{start}-{end}": float(losses[start:end].mean().exp()) for start, end in pairwise(POSITIONS)}


def read_results(file: Path | None) -> dict[str, Any]:
    """Of an earlier run."""
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}


def has_point(file: Path | None, name: str, tokens: int) -> bool:
    """Whether an earlier run has measured it."""
    points = read_results(file).get("rows", {}).get(name, {}).get("points", [])
    return any(point["tokens"] == tokens for point in points)


def add_point(file: Path | None, case: Case, facts: dict[str, Any], point: dict[str, Any]) -> None:
    """Into the file."""
    with changed(file) as results:
        row = results["rows"].setdefault(case.name, {**asdict(case), **facts, "points": []})
        others = [each for each in row["points"] if each["tokens"] != point["tokens"]]
        row["points"] = sorted([*others, {**point, "machine": machine_facts()}], key=lambda each: each["tokens"])


@contextmanager
def changed(file: Path | None) -> Iterator[dict[str, Any]]:
    """What the file holds, to be changed and written again; several processes may do so."""
    if file is None:
        yield {"rows": {}}
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        results = read_results(file) or {"benchmark": "real healing", "rows": {}}
        yield results
        write_json(file, results)


def words(point: dict[str, Any]) -> str:
    """A point in a line."""
    fidelity = point["fidelity"]
    line = f"perplexity {fidelity['perplexity']:.4g}, KL {fidelity['kl']:.4f}, {point['heal_seconds']:.0f} s"
    return line if "mean" not in point else f"{line}, mean of tasks {100 * point['mean']['mean']:.2f}"


def table(results: dict[str, Any]) -> str:
    """All points."""
    columns = ("row", "rank + rope", "tokens", "perplexity", "KL (nats)", "top-1", "mean of tasks, %", "without mmlu")
    lines: list[list[Any]] = []
    for name, row in results.get("rows", {}).items():
        for point in row["points"]:
            fidelity, mean = point["fidelity"], point.get("mean", {})
            scores = [
                f"{100 * mean[key]:.2f} ± {100 * mean[f'{key}_stderr']:.2f}" if key in mean else None
                for key in ("mean", "mean_without_mmlu")
            ]
            values = [
                f"{point['tokens']:,}",
                fidelity["perplexity"],
                f"{fidelity['kl']:.4f}",
                f"{fidelity['top1']:.1%}",
            ]
            lines.append([name, row["widths"], *values, *scores])
    return format_table(columns, lines)


def run(options: argparse.Namespace) -> int:
    """All rows; the exit code."""
    cases = select([case for case in all_cases() if case.method != "sampled"], options.rows)
    if options.source:
        figures = measure(options.checkpoint, options)
        print(f"source: {json.dumps(figures)}", flush=True)
        with changed(options.json) as results:
            results["source"] = {**figures, "machine": machine_facts()}
    if options.at_once > 1:
        # forked: the imports, which take the longest to start, are made once; nothing has touched CUDA here
        with ProcessPoolExecutor(options.at_once, mp_context=multiprocessing.get_context("fork")) as pool:
            failures = list(pool.map(run_row, cases, [options] * len(cases)))
    else:
        failures = [run_row(case, options) for case in cases]
    print(f"{options.checkpoint}: {describe(machine_facts())}")
    print(table(read_results(options.json)))
    wrong = [failure for failure in failures if failure is not None]
    for sentence in wrong:
        print(f"bench_real_healing: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what the shared functions of bench_fidelity.py read besides is set here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the source")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--data", type=Path, required=True, help="text to heal on, as `xeco-distill --data` takes it")
    parser.add_argument("--text", type=Path, required=True, help="text that measures, taken raw")
    parser.add_argument("--tasks", type=Path, help="folder of task files [none are scored]")
    parser.add_argument("--limit", type=int, help="rows of a task, evenly spread [all]")
    parser.add_argument(
        "--score-from", type=int, default=0, metavar="N", help="score tasks after N tokens and more [0]"
    )
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="rows to measure, as '25%%/calibrated/*' [all]")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens to heal on")
    parser.add_argument("--heal", nargs=argparse.REMAINDER, default=[], help="last: options for xeco-distill")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="tokens to calibrate on [16384]")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window [1024]")
    parser.add_argument("--num-windows", type=int, default=12, help="windows taken [12]")
    parser.add_argument(
        "--long-windows", type=int, default=0, help="windows of 8192 tokens for perplexity by position [0]"
    )
    parser.add_argument("--source", action="store_true", help="measure the source, too")
    parser.add_argument("--at-once", type=int, default=1, help="rows side by side [1]")
    parser.add_argument("--again", action="store_true", help="measure points again that stand in the file already")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each row [1]")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the models; conversions stay there")
    parser.add_argument("--json", type=Path, help="the results, kept after every point")
    options = parser.parse_args(arguments)
    options.calibration_part, options.attended, options.refine_steps = ":", True, None
    options.fields = {"device": options.device}
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; a foreseen failure is one sentence."""
    try:
        return run(parse_arguments(arguments))
    except XecoError as error:
        print(f"bench_real_healing: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

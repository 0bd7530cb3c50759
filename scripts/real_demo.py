"""What `make real` does with a real pretrained model: convert it, generate from both, measure both caches, score both.

    python scripts/real_demo.py MODEL OUTPUT [--kv-size 50%] [--calibration TEXT] [--text TEXT] [--tasks DIR]

MODEL is a checkpoint folder (scripts/real_model.py makes one). Without --calibration it calibrates on its own samples. --text
measures perplexity, KL and top-1 agreement (on wikitext-2, for one), --tasks scores a folder of task files, as `xeco-distill eval
--include-tasks` takes it. Without them, and without $XECO_SHARED that has them, scores are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xeco_convert.cli.convert import convert_command
from xeco_convert.demo.__main__ import generate
from xeco_convert.errors import XecoError

QUESTION = "Why is the sky blue? Answer in two sentences."
BEGINNING = "The first person to walk on the moon was"
# in $XECO_SHARED (benchmarks/README.md), where options do not say otherwise
SHARED = {"calibration": "text/wikitext2_raw_valid.txt", "text": "text/wikitext2_gptq_test.txt", "tasks": "eval"}


def convert(options: argparse.Namespace) -> Path:
    """Run the command, print it and its report; the folder it wrote."""
    target = options.output / "converted"
    arguments = [str(options.model), str(target), "--kv-size", options.kv_size, "--overwrite"]
    if options.calibration is not None:
        arguments += ["--calibration", str(options.calibration)]
    print(f"$ xeco-convert {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    convert_command.main(args=arguments, prog_name="xeco-convert", standalone_mode=False)
    print(f"converted in {time.monotonic() - started:.0f} s\n", flush=True)
    return target


def show_generation(folders: Mapping[str, Path]) -> None:
    """Greedy text of every model after a chat turn and after plain text, and the bytes its cache holds then."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    prompts = [BEGINNING]
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": QUESTION}]
        prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    for prompt in prompts:
        for title, folder in folders.items():
            text, measured_bytes, num_tokens = generate(folder, prompt)
            print(
                f"{title}: {text}\n{title}: {measured_bytes:,} bytes in the KV cache after {num_tokens} tokens\n",
                flush=True,
            )


def quality(models: Mapping[str, Any], tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of both, KL and top-1 agreement on the first windows of a text."""
    from xeco_convert.calibration.files import read_records
    from xeco_convert.evaluate import measure_fidelity, token_windows

    text = "\n\n".join(str(record.get("text", "")) for record in read_records(str(options.text), flag="--text"))
    windows = token_windows(text, tokenizer, options.window, options.num_windows)
    fidelity = measure_fidelity(*models.values(), windows)
    print(
        f"{options.text.name}, {options.num_windows} windows of {options.window}: perplexity "
        f"{fidelity.perplexity_source:.2f} -> {fidelity.perplexity:.2f}, KL {fidelity.kl:.4f}, top-1 {fidelity.top1:.1%}",
        flush=True,
    )
    return fidelity.to_dict()


def task_scores(models: Mapping[str, Any], tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of both on task files, with their standard errors and the mean."""
    from xeco_distill.evaluation.harness import file_scores, find_tasks
    from xeco_distill.evaluation.task_files import NORMALISED, means

    tasks = find_tasks(options.task_names.split(","), options.tasks, options.rows).files
    scores = {title: file_scores(model, tokenizer, tasks) for title, model in models.items()}
    for task in tasks:
        metric = "acc_norm" if task.name in NORMALISED else "acc"
        values = [
            f"{title} {100 * found[task.name][metric]:.1f} ± {100 * found[task.name][f'{metric}_stderr']:.1f}"
            for title, found in scores.items()
        ]
        print(f"{task.name} ({len(task.rows)} rows, {metric} in %): {', '.join(values)}")
    averages = {title: means(found) for title, found in scores.items()}
    print("mean: " + ", ".join(f"{title} {100 * found['mean']:.1f}" for title, found in averages.items()))
    return {title: {"tasks": found, "mean": averages[title]} for title, found in scores.items()}


def score(folders: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """What there are files for, of both models in float32."""
    results: dict[str, Any] = {}
    if options.text is None and options.tasks is None:
        print("no scores: no text and no tasks given (make real REAL_TEXT=FILE REAL_TASKS=DIR)")
        return results
    import torch

    from xeco_convert.pretrained import load_causal_lm
    from xeco_convert.tokenizer import load_tokenizer

    models = {title: load_causal_lm(folder, torch.float32).eval() for title, folder in folders.items()}
    tokenizer = load_tokenizer(options.model)
    if options.text is not None:
        results["quality"] = quality(models, tokenizer, options)
    else:
        print("no perplexity: no text given (make real REAL_TEXT=FILE, wikitext-2 for one)")
    if options.tasks is not None:
        results["tasks"] = task_scores(models, tokenizer, options)
    else:
        print(
            "no task scores: no folder of task files given (make real REAL_TASKS=DIR; docs/healing.md has their form)"
        )
    return results


def run(options: argparse.Namespace) -> None:
    """All of it."""
    if not (options.model / "config.json").is_file():
        sys.exit(
            f"real_demo: {options.model}: expected a checkpoint folder with config.json, found none; check the path."
        )
    from transformers.utils import logging

    logging.disable_progress_bar()
    folders = {"source": options.model, "converted": convert(options)}
    show_generation(folders)
    results = score(folders, options)
    if results:
        file = options.output / "scores.json"
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"scores: {file}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, those that $XECO_SHARED has files for filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; what stands there is replaced")
    parser.add_argument("--kv-size", default="50%", metavar="SHARE", help="size of the KV cache [50%%]")
    parser.add_argument("--calibration", metavar="TEXT", help="as xeco-convert takes it [the model's own samples]")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to measure on, taken raw")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens of a window [1024]")
    parser.add_argument("--num-windows", type=int, default=12, metavar="N", help="windows of the text [12]")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="folder of task files")
    parser.add_argument(
        "--task-names", default="arc_easy,piqa,openbookqa", metavar="LIST", help="[arc_easy,piqa,openbookqa]"
    )
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="rows of each task [100]")
    options = parser.parse_args(arguments)
    shared = os.environ.get("XECO_SHARED")
    for name, path in SHARED.items():
        file = Path(shared, path) if shared else None
        if getattr(options, name) is None and file is not None and file.exists():
            setattr(options, name, file)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; a foreseen failure is one sentence."""
    try:
        run(parse_arguments(arguments))
    except XecoError as error:
        print(f"real_demo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

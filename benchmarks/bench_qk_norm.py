"""What a norm of queries and keys costs a conversion: two small models that differ in it alone, before any healing.

    python benchmarks/bench_qk_norm.py train FOLDER      # FOLDER/llama and FOLDER/qwen3, a quarter of an hour of one core each
    python benchmarks/bench_qk_norm.py measure FOLDER [--json FILE]

Both have 4 layers, hidden_size 192, 6 query and 3 key/value heads of 64, and are trained by the demo's trainer on the demo's
language with the same seed, text and number of steps. Converted with the same rank and rotary width in all layers, calibrated on
stories of another seed, measured on stories of a third.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xeco_convert import convert
from xeco_convert.demo.language import generate_stories
from xeco_convert.evaluate import measure_fidelity, sequence_windows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from tiny_model import train

# rank and rotary width: 50, 25 and 12.5 % of the 384 numbers that a layer of the source caches
_WIDTHS = ((144, 48), (64, 32), (32, 16))
_CALIBRATION_TOKENS, _MEASURED_TOKENS, _WINDOW = 16384, 16384, 512
TWINS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def untrained(kind: str, tokenizer: Any) -> Any:
    """The twin of this kind, weights drawn from torch's seed."""
    config_class, model_class = TWINS[kind]
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    return model_class(config_class(**train.settings_of(tokenizer), **sizes))


def train_twin(kind: str, folder: Path, options: train.Options) -> None:
    """Train one twin and write it to folder/kind."""
    stories = generate_stories(train.NUM_STORIES, options.seed)
    tokenizer = train.build_tokenizer(stories)
    stream = train.pack(stories, tokenizer, options.seed)
    torch.manual_seed(options.seed)
    model = untrained(kind, tokenizer).train()
    print(f"{kind}: {model.num_parameters()} parameters, {len(stream)} tokens of text", flush=True)
    train.rehearse(model, options)
    train.fit(model, stream, options)
    train.save(model, tokenizer, folder / kind)


def token_ids(tokenizer: Any, seed: int, count: int) -> list[int]:
    """`count` tokens of stories that the twins were not trained on."""
    return train.pack(generate_stories(count // 50, seed), tokenizer, seed)[:count].tolist()


def measure_twin(kind: str, qk_norm: str, widths: tuple[int, int], folder: Path, work: Path) -> dict[str, Any]:
    """One conversion beside its source: perplexities, gap and KL in nats, top-1."""
    tokenizer = AutoTokenizer.from_pretrained(folder / kind)
    calibration = work / "calibration.json"
    calibration.write_text(json.dumps([token_ids(tokenizer, 101, _CALIBRATION_TOKENS)]), encoding="utf-8")
    rank, rope = widths
    options = {"rank": rank, "rope_dim": rope, "qk_norm": qk_norm, "dtype": "float32", "overwrite": True}
    report = convert(
        folder / kind, work / "out", calibration=str(calibration), calibration_tokens=_CALIBRATION_TOKENS, **options
    )
    windows = sequence_windows([token_ids(tokenizer, 102, _MEASURED_TOKENS)], _WINDOW)
    source, converted = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (folder / kind, work / "out")
    )
    found = measure_fidelity(source, converted, windows)
    form = {"llama": "none"}.get(kind, qk_norm)
    return {"model": kind, "keys": form, "kv_share": report.kv_share, "rank": rank, "rope_dim": rope} | {
        **asdict(found),
        "gap": found.gap,
    }


def measure(folder: Path, json_file: Path | None) -> None:
    """The table: each twin at each size, the one with the norm in both forms."""
    machine, rows = machine_facts(), []
    for widths in _WIDTHS:
        for kind, qk_norm in (("llama", "exact"), ("qwen3", "exact"), ("qwen3", "regression")):
            with tempfile.TemporaryDirectory() as work:
                rows.append(measure_twin(kind, qk_norm, widths, folder, Path(work)))
    columns = ["model", "norm of keys", "KV", "rank + rope", "source", "converted", "gap (nats)", "KL (nats)", "top-1"]
    cells = [
        [
            row["model"],
            row["keys"],
            f"{row['kv_share']:.1%}",
            f"{row['rank']}+{row['rope_dim']}",
            row["perplexity_source"],
            row["perplexity"],
            row["gap"],
            row["kl"],
            f"{row['top1']:.1%}",
        ]
        for row in rows
    ]
    print(describe(machine))
    print(format_table(columns, cells))
    write_json(json_file, {"machine": machine, "rows": rows})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line; train, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(TWINS), default=list(TWINS), help="which twins to train")
    parser.add_argument("--steps", type=int, default=900, help="batches of stories")
    parser.add_argument(
        "--rehearsal", type=int, default=train.Options.rehearsal, help="batches of random words at first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.what == "measure":
        measure(options.folder, options.json)
        return
    for kind in options.kinds:
        train_twin(
            kind, options.folder, train.Options(seed=options.seed, rehearsal=options.rehearsal, steps=options.steps)
        )


if __name__ == "__main__":
    main()

"""Exports of a converted checkpoint, loaded by transformers' own DeepSeek-V3 class in a Python without this package.

    python benchmarks/bench_export.py [--checkpoint IN] [--kv 50% 25%] [--json benchmarks/results/export.json]

Each row converts with --portable in float32, exports, and starts stock_without_package.py in a Python that cannot import
xeco_convert. Compared with the converted model here: logits of 4 windows of 256 tokens of the measuring text, 100 greedy
tokens, and the bytes of the cache. Exits with 1 where logits differ by more than 1e-3, a token differs, or the cache holds
anything but rank + rope dim numbers for each token and layer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.export import ExportOptions, export_checkpoint

SHARED = Path(os.environ.get("XECO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
ALONE = Path(__file__).with_name("stock_without_package.py")
NEW_TOKENS = 100
COLUMNS = ["target", "KV", "rank + rope", "logits differ by", "greedy tokens equal", "cache bytes", "rank + rope bytes"]


def run_without_package(folder: Path, ids: torch.Tensor, work: Path, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """What transformers' own class gives for `ids` [B, T] in a Python that cannot import xeco_convert."""
    torch.save(ids, work / "ids.pt")
    command = [sys.executable, "-I", "-S", str(ALONE), sysconfig.get_path("purelib"), str(folder)]
    command += [str(work / "ids.pt"), str(work / "stock.pt"), str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return torch.load(work / "stock.pt")


@torch.no_grad()
def compare(
    converted: Path, stock: Path, ids: torch.Tensor, work: Path, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Our model in this Python, the stock class in one without us, in float32."""
    found = run_without_package(stock, ids, work, new_tokens)
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    prompt = ids[:1, :16]
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    own = ours.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)[0, prompt.shape[1] :]
    unequal = (own != found["greedy"]).nonzero()
    return {
        "logits_difference": float((found["logits"] - ours(ids).logits).abs().max()),
        "greedy_equal": new_tokens if unequal.numel() == 0 else int(unequal[0]),
        "cache_bytes": found["cache_bytes"],
        "cache_tokens": found["cache_tokens"],
    }


def measure(source: Path, text: Path, ids: torch.Tensor, kv_size: str, target: str) -> dict[str, Any]:
    """Convert, export, compare."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        xeco_convert.convert(
            source, work / "out", kv_size=kv_size, portable=True, dtype="float32", calibration=str(text)
        )
        report = export_checkpoint(work / "out", work / "stock", ExportOptions(target=target))
        row = compare(work / "out", work / "stock", ids, work)
        layers = AutoModelForCausalLM.from_pretrained(work / "out").config.num_hidden_layers
    width = report.kv_lora_rank + report.qk_rope_head_dim
    row.update(target=target, kv_size=kv_size, kv_lora_rank=report.kv_lora_rank, rope_dim=report.qk_rope_head_dim)
    return {**row, "expected_bytes": row["cache_tokens"] * layers * width * 4}


def cells(row: dict[str, Any]) -> list[Any]:
    widths = f"{row['kv_lora_rank']} + {row['rope_dim']}"
    greedy = f"{row['greedy_equal']} of {NEW_TOKENS}"
    return [
        row["target"],
        row["kv_size"],
        widths,
        row["logits_difference"],
        greedy,
        row["cache_bytes"],
        row["expected_bytes"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "checkpoints" / "tinystories-gqa")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "train.txt")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "valid.txt", help="text that measures")
    parser.add_argument("--kv", nargs="+", default=["50%", "25%"])
    parser.add_argument("--targets", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--json", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = machine_facts()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :1024].view(4, 256)
    rows = [
        measure(arguments.checkpoint, arguments.calibration, ids, kv, target)
        for kv in arguments.kv
        for target in arguments.targets
    ]
    print(describe(machine))
    print(format_table(COLUMNS, [cells(row) for row in rows]))
    write_json(arguments.json, {"machine": machine, "checkpoint": arguments.checkpoint.name, "rows": rows})
    kept = [
        row["logits_difference"] <= 1e-3
        and row["greedy_equal"] == NEW_TOKENS
        and row["cache_bytes"] == row["expected_bytes"]
        for row in rows
    ]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()

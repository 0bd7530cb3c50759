"""Latents and rotary keys in few bits: what they cost in quality at a given number of bytes, and what decoding takes.

    python benchmarks/bench_codes.py --part quality --checkpoint IN --text FILE --calibration FILE --kv-sizes 12.5%,7.8%
    python benchmarks/bench_codes.py --part decode

quality: converts at each size and --cache-bits, and compares source and result on windows of the text, in float32 (perplexity,
KL, top-1); the codes are those of the cache. decode: one token over a cache, the kernel over codes against this package's own
over bfloat16, in turns, for B 1 and 4, H 32, R 128, P 32; exits with 1 where 8 bits are below 1.2 or 4 bits below 1.3 times as
fast over 32,768 tokens, or either below 0.95 over 4,096. 3 bits are bit planes as a conversion shares them out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from timing import median_seconds
from transformers import AutoModelForCausalLM, AutoTokenizer

from xeco_convert import convert
from xeco_convert.errors import OptionError
from xeco_convert.evaluate import measure_fidelity, token_windows
from xeco_convert.modeling.layer_xeco import average_bits
from xeco_convert.ops import latent_attention_decode, latent_attention_packed
from xeco_convert.ops.extension import extension
from xeco_convert.ops.packed_rows import Bits, pack_rows

_SHARED = Path(os.environ.get("XECO_SHARED") or Path(__file__).resolve().parents[2] / "shared")
QUALITY = ("KV size", "--cache-bits", "KV", "widths (rank + rope: bits)", "perplexity", "KL (nats)", "top-1")
DECODE = ("B", "T", "bits", "bfloat16, ms", "codes, ms", "times as fast")
HEADS, RANK, ROPE, SCALE = 32, 128, 32, 0.08
PLANES = (128, 128, 80, 24, 8, 8, 8)
LEAST = {(32768, 8): 1.2, (32768, 4): 1.3, (4096, 8): 0.95, (4096, 4): 0.95}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    machine = machine_facts()
    rows = quality(arguments) if arguments.part == "quality" else decode(arguments.repeats)
    print(describe(machine) + "\n")
    print(format_table(QUALITY if arguments.part == "quality" else DECODE, rows))
    write_json(arguments.json, {"machine": machine, "settings": _settings(arguments), "rows": rows})
    if arguments.part == "decode" and any(row[5] < LEAST.get((row[1], int(row[2].split()[0])), 0.0) for row in rows):
        sys.exit("a figure is below its bound")


def quality(arguments: argparse.Namespace) -> list[list[Any]]:
    """A row for each size and number of bits; what cannot be met says so."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    windows = token_windows(text, tokenizer, arguments.window, arguments.num_windows)
    source = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    options = {"calibration": str(arguments.calibration), "calibration_tokens": arguments.calibration_tokens}
    rows: list[list[Any]] = []
    for size in arguments.kv_sizes.split(","):
        for bits in arguments.bits.split(","):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "out"
                try:
                    report = convert(arguments.checkpoint, output, kv_size=size, cache_bits=bits, **options)
                except OptionError as error:
                    print(error, file=sys.stderr)
                    rows.append([size, bits, None, "cannot be met", None, None, None])
                    continue
                model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
                found = measure_fidelity(source, model, windows)
            measured = [found.perplexity, f"{found.kl:.4f}", f"{found.top1:.1%}"]
            rows.append([size, bits, f"{report.kv_share:.1%}", widths_in_bits(report), *measured])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def widths_in_bits(report: Any) -> str:
    """The different widths of a conversion's layers with their bits."""
    widths = [f"{layer.kv_lora_rank} + {layer.qk_rope_head_dim}: {layer.bits or '16 + 16'}" for layer in report.layers]
    return "; ".join(dict.fromkeys(widths))


def decode(repeats: int) -> list[list[Any]]:
    """A row for each number of sequences, length and bits."""
    rows: list[list[Any]] = []
    for batch, tokens in ((1, 4096), (1, 32768), (4, 4096), (4, 32768)):
        seconds = median_seconds(_decoders(batch, tokens), repeats)
        base = seconds.pop("16")
        rows += [[batch, tokens, name, 1e3 * base, 1e3 * each, base / each] for name, each in seconds.items()]
    return rows


def _decoders(batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """One step over bfloat16 rows, and over the same rows in codes, by their bits."""
    torch.manual_seed(0)
    c_kv, k_rope = torch.randn(batch, tokens, RANK), torch.randn(batch, tokens, ROPE)
    queries = [torch.randn(batch, 1, HEADS, width).bfloat16() for width in (RANK, ROPE)]
    rows = (c_kv.bfloat16(), k_rope.bfloat16())
    runs = {"16": partial(latent_attention_decode, *queries, *rows, softmax_scale=SCALE)}
    every_bits: list[tuple[Bits, Bits]] = [(8, 8), (4, 8), (4, 4), (PLANES, 6)]
    for latent, rope in every_bits:
        codes = (pack_rows(c_kv, latent), pack_rows(k_rope, rope))
        bits = {"latent_bits": latent, "rope_bits": rope}
        runs[f"{average_bits(latent):g} + {rope}"] = partial(
            latent_attention_packed, *queries, *codes, **bits, softmax_scale=SCALE
        )
    return runs


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    module = extension()
    return {**settings, "cpu_level": None if module is None else module.cpu_level()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("quality", "decode"), required=True)
    parser.add_argument("--checkpoint", type=Path, default=_SHARED / "checkpoints" / "tinystories-gqa")
    parser.add_argument("--text", type=Path, default=_SHARED / "text" / "valid.txt")
    parser.add_argument("--calibration", type=Path, default=_SHARED / "text" / "train.txt")
    parser.add_argument("--calibration-tokens", type=int, default=24 * 512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--num-windows", type=int, default=24)
    parser.add_argument("--kv-sizes", default="25%,12.5%,9.4%,7.8%")
    parser.add_argument("--bits", default="16,8,4,3,auto")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Caches in 4 bits against HQQ, what transformers' quantised cache offers: quality at equal bytes, and tokens per second.

    pip install hqq
    python benchmarks/bench_hqq.py --part quality --checkpoint IN --text FILE --calibration FILE --kv-sizes 25%,12.5%
    python benchmarks/bench_hqq.py --part generate --checkpoint IN --calibration FILE --rank 128 --rope-dim 64

quality: at each size this package's own choice of widths and bits, beside the conversion in 16 bits that takes as many bytes once
HQQ has its latents and rotary keys in 4 bits, groups of 64 numbers of a token with a scale and a zero in 16 bits each (4.5 bits a
number). HQQ rounds every token that is attended to: without the residual of 128 tokens that transformers keeps. KL(source ‖
converted) on windows of the text, in float32.

generate: one conversion in 16 bits and the same widths in codes; greedy tokens per second behind a full cache: QuantizedCache
(which cache_implementation="quantized" makes; hqq, 4 bits), one in the model's dtype, and codes, in turns.

Exits with 1 where KL is above 0.8 times that of HQQ, or tokens per second below 5 times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_codes import widths_in_bits
from reporting import describe, format_table, machine_facts, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from xeco_convert import convert
from xeco_convert.evaluate import measure_fidelity, token_windows

_SHARED = Path(os.environ.get("XECO_SHARED") or Path(__file__).resolve().parents[2] / "shared")
GROUP, NBITS = 64, 4
BITS_OF_HQQ = NBITS + 2 * 16 / GROUP
QUALITY = ("KV size", "cache", "KV", "widths (rank + rope: bits)", "perplexity", "KL (nats)", "of hqq's")
GENERATE = ("context", "cache", "tokens/s", "times hqq")
MOST_KL, LEAST_SPEED = 0.8, 5.0


def main() -> int:
    """Measure, print, write."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    machine = machine_facts()
    rows = quality(options) if options.part == "quality" else generate(options)
    print(describe(machine) + "\n")
    print(format_table(QUALITY if options.part == "quality" else GENERATE, rows))
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    write_json(options.json, {"machine": machine, "settings": settings, "rows": rows})
    if options.part == "quality":
        return int(any(row[6] is not None and row[6] > MOST_KL for row in rows))
    return int(any(row[1].startswith("codes") and row[3] < LEAST_SPEED for row in rows))


def quality(options: argparse.Namespace) -> list[list[Any]]:
    """Two rows for each size."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    text = options.text.read_text(encoding="utf-8")
    windows = token_windows(text, tokenizer, options.window, options.num_windows)
    source = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    rows: list[list[Any]] = []
    for size in options.kv_sizes.split(","):
        share = float(size.removesuffix("%"))
        theirs = f"{share * 16 / BITS_OF_HQQ:.4g}%"
        kls = []
        for name, fields in (("hqq", {"kv_size": theirs}), ("codes", {"kv_size": size, "cache_bits": "auto"})):
            with tempfile.TemporaryDirectory() as folder:
                model, report = _converted(options, Path(folder) / "out", **fields)
                if name == "hqq":
                    through_hqq(model)
                found = measure_fidelity(source, model, windows)
            kls.append(found.kl)
            scale = BITS_OF_HQQ / 16 if name == "hqq" else 1.0
            measured = [found.perplexity, f"{found.kl:.4f}", kls[-1] / kls[0] if name == "codes" else None]
            rows.append([size, name, f"{report.kv_share * scale:.1%}", widths_in_bits(report), *measured])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def through_hqq(model: Any) -> None:
    """Every token's latent and rotary key as HQQ gives them back."""
    for attention in model.modules():
        if hasattr(attention, "_cached"):
            attention._cached = lambda cache, c_kv, k_rope: (as_hqq(c_kv), as_hqq(k_rope))


def as_hqq(rows: Tensor) -> Tensor:
    """Rows [B, T, n] in groups of 64 numbers of a token, the last one of what is left."""
    from hqq.core.quantize import Quantizer

    parts = []
    for part in rows.split(GROUP, dim=-1):
        how = {"nbits": NBITS, "axis": 1, "group_size": part.shape[-1], "compute_dtype": rows.dtype, "device": "cpu"}
        parts.append(Quantizer.dequantize(*Quantizer.quantize(part.contiguous(), **how)))
    return torch.cat(parts, dim=-1).to(rows.dtype)


def generate(options: argparse.Namespace) -> list[list[Any]]:
    """A row for each cache."""
    widths = {"rank": options.rank, "rope_dim": options.rope_dim}
    with tempfile.TemporaryDirectory() as folder:
        wide, _ = _converted(options, Path(folder) / "wide", **widths)
        codes, report = _converted(options, Path(folder) / "codes", **widths, cache_bits=options.cache_bits)
    runs: dict[str, Callable[[], float]] = {
        "hqq, 4 bits": lambda: _seconds(wide, QuantizedCache("hqq", wide.config, nbits=NBITS), options),
        f"{options.dtype}": lambda: _seconds(wide, DynamicCache(config=wide.config), options),
        f"codes, {widths_in_bits(report)}": lambda: _seconds(codes, DynamicCache(config=codes.config), options),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    tokens = options.batch * options.new_tokens
    rates = {name: tokens / statistics.median(each) for name, each in times.items()}
    return [[options.context, name, rate, rate / rates["hqq, 4 bits"]] for name, rate in rates.items()]


@torch.no_grad()
def _seconds(model: Any, cache: Any, options: argparse.Namespace) -> float:
    """Of some tokens behind a full cache. What it holds is one token's rows again and again: the work is the same."""
    context, tokens, batch = options.context, options.new_tokens, options.batch
    first = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=first)
    for number, layer in enumerate(first.layers):
        cache.update(*(rows.repeat(batch, 1, context, 1) for rows in (layer.keys, layer.values)), number)
    prompt = torch.zeros(batch, context + 1, dtype=torch.long)
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    started = time.perf_counter()
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **how)
    seconds = time.perf_counter() - started
    assert result.shape[1] == context + 1 + tokens
    return seconds


def _converted(options: argparse.Namespace, folder: Path, **fields: Any) -> tuple[Any, Any]:
    text = {"calibration": str(options.calibration), "calibration_tokens": options.calibration_tokens}
    report = convert(options.checkpoint, folder, **text, **fields)
    dtype = torch.float32 if options.part == "quality" else getattr(torch, options.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("quality", "generate"), required=True)
    parser.add_argument("--checkpoint", type=Path, default=_SHARED / "checkpoints" / "tinystories-gqa")
    parser.add_argument("--text", type=Path, default=_SHARED / "text" / "valid.txt")
    parser.add_argument("--calibration", type=Path, default=_SHARED / "text" / "train.txt")
    parser.add_argument("--calibration-tokens", type=int, default=24 * 512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--num-windows", type=int, default=24)
    parser.add_argument("--kv-sizes", default="25%,12.5%,7.8%")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rope-dim", type=int, default=64)
    parser.add_argument("--cache-bits", default="4", help="of the codes in generate [4]")
    parser.add_argument(
        "--context", type=int, default=8192 - 64, help="cached tokens before those that are generated [8128]"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model in generate")
    parser.add_argument("--batch", type=int, default=1, help="sequences of generate [1]")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

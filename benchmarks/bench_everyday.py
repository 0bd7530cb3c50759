"""8-bit weights and quantised caches on a converted checkpoint: bytes, KL and top-1 beside the same model without them.

    pip install torchao hqq optimum-quanto     # an environment of its own: they warn at every start where they have no GPU
    python benchmarks/bench_everyday.py [--checkpoint IN] [--kv 50%] [--json benchmarks/results/everyday.json]

Caches are transformers' QuantizedCache: fp8 needs nothing, hqq and quanto their packages. 4 rows of 160 tokens of the measuring
text, 32 at once and then one by one, so that every prediction behind the first 32 reads the quantised cache; bytes are those of
all layers after the last token, scales and unquantised remainder included. Weights: torchao's int8 weight-only in the converted
model, bfloat16, on 4 windows of 256 tokens; bytes of all parameters, embeddings (not quantised) included. Deterministic.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

import xeco_convert

SHARED = Path(os.environ.get("XECO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PROMPT, TOKENS = 32, 160
# name -> (package, backend, settings); groups that divide the widths, a short remainder in full precision
CACHES: dict[str, tuple[str | None, str, dict[str, int]]] = {
    "fp8": (None, "fp8", {}),
    "hqq, 8 bits, groups of 64": ("hqq", "hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 64}),
    "hqq, 4 bits, groups of 64": ("hqq", "hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 64}),
    "quanto, 4 bits, groups of 64": ("optimum.quanto", "quanto", {"nbits": 4, "q_group_size": 64}),
}
COLUMNS = ["what", "bytes", "share", "KL (nats)", "top-1"]


def installed(package: str | None) -> bool:
    """Whether a package, or a module of one, can be imported."""
    if package is None:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors in lists, dicts and tensor subclasses."""
    if isinstance(value, Tensor):
        if type(value) in (Tensor, torch.nn.Parameter):
            return value.nbytes
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(stored_bytes(getattr(value, name)) for name in names)
    if isinstance(value, dict):
        return sum(map(stored_bytes, value.values()))
    return sum(map(stored_bytes, value)) if isinstance(value, list | tuple) else 0


def cache_bytes(cache: Any) -> int:
    """What the layers of a cache hold."""
    fields = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(stored_bytes(vars(layer).get(name)) for layer in cache.layers for name in fields)


@torch.no_grad()
def decoded_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits [B, T - PROMPT + 1, V] of a prompt's last token and of every later one, each read from the cache."""
    found = [model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1:]]
    for step in range(PROMPT, ids.shape[1]):
        found.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def compare(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """KL(expected ‖ found) in nats per token, and the share of tokens with the same most likely prediction."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    same = expected.argmax(-1) == found.argmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float(same.double().mean())


def cache_rows(folder: Path, ids: Tensor) -> list[dict[str, Any]]:
    """Every quantised cache beside the plain one in bfloat16 numbers, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = DynamicCache(config=model.config)
    expected = decoded_logits(model, ids[:, :TOKENS], plain)
    whole = cache_bytes(plain) // 2  # as bfloat16
    rows = [{"what": "cache, bfloat16", "bytes": whole, "share": 1.0, "kl": 0.0, "top1": 1.0}]
    for name, (package, backend, settings) in CACHES.items():
        if not installed(package):
            rows.append({"what": f"cache, {name}", "skipped": f"{package} is not installed"})
            continue
        remainder = {"residual_length": 16} if settings else {}
        cache = QuantizedCache(backend, model.config, **settings, **remainder)
        kl, top1 = compare(expected, decoded_logits(model, ids[:, :TOKENS], cache))
        size = cache_bytes(cache)
        rows.append({"what": f"cache, {name}", "bytes": size, "share": size / whole, "kl": kl, "top1": top1})
    return rows


@torch.no_grad()
def weight_rows(folder: Path, ids: Tensor) -> list[dict[str, Any]]:
    """torchao's int8 weights in the converted model beside bfloat16 ones."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    whole, expected = stored_bytes(list(plain.parameters())), plain(ids).logits.float()
    rows = [{"what": "weights, bfloat16", "bytes": whole, "share": 1.0, "kl": 0.0, "top1": 1.0}]
    if not installed("torchao"):
        return [*rows, {"what": "weights, torchao int8", "skipped": "torchao is not installed"}]
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings).eval()
    kl, top1 = compare(expected, model(ids).logits.float())
    size = stored_bytes(list(model.parameters()))
    if model.generate(ids[:1, :16], min_new_tokens=20, max_new_tokens=20, do_sample=False).shape[1] != 36:
        raise RuntimeError("torchao int8: expected 20 generated tokens")
    return [*rows, {"what": "weights, torchao int8", "bytes": size, "share": size / whole, "kl": kl, "top1": top1}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "checkpoints" / "tinystories-gqa")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "train.txt")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "valid.txt", help="text that measures")
    parser.add_argument("--kv", default="50%")
    parser.add_argument("--json", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = machine_facts()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :1024].view(4, 256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        xeco_convert.convert(
            arguments.checkpoint, folder, kv_size=arguments.kv, calibration=str(arguments.calibration), overwrite=True
        )
        rows = [*cache_rows(folder, ids), *weight_rows(folder, ids)]
    for row in rows:
        if "skipped" in row:
            print(f"{row['what']}: {row['skipped']}", file=sys.stderr)
    print(describe(machine))
    measured = [row for row in rows if "skipped" not in row]
    cells = [
        [row["what"], row["bytes"], f"{row['share']:.1%}", f"{row['kl']:.5f}", f"{row['top1']:.1%}"] for row in measured
    ]
    print(format_table(COLUMNS, cells))
    write_json(arguments.json, {"machine": machine, "checkpoint": arguments.checkpoint.name, "rows": rows})


if __name__ == "__main__":
    main()

"""Every family on a tiny model with random weights: exactness, and the error of conversions to half and a quarter of the cache.

    python benchmarks/bench_families.py [--families qwen3,gemma2] [--json benchmarks/results/families.json]

Random weights have flat spectra, so the errors at 50 % and 25 % say how families compare with each other, not what a trained
model loses. Exactness and the error of the regression of normalised keys do say what they say. Models are those of
tests/builders.py; calibration on random tokens, measured on others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.evaluate import measure_fidelity

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from builders import VARIANTS, VOCABULARY, build_checkpoint, random_ids

COLUMNS = [
    "family",
    "exactness error",
    "key regression",
    "scale alone",
    "error at 50 %",
    "KL at 50 %",
    "error at 25 %",
    "KL at 25 %",
]


def measure(variant: str, folder: Path) -> dict[str, Any]:
    """One family: the worst layer's exactness, key regression layer by layer, output error (median layer) and KL."""
    source = build_checkpoint(folder / "source", variant, tokenizer=True)
    words = torch.randint(3, VOCABULARY, (16384,), generator=torch.Generator().manual_seed(5))
    (folder / "words.txt").write_text(" ".join(f"w{number}" for number in words.tolist()))
    attention = "eager" if variant == "gemma2" else "sdpa"
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=attention)
    row: dict[str, Any] = {"family": variant}
    for size in ("50%", "25%"):
        output = folder / f"out-{size}"
        report = xeco_convert.convert(
            source,
            output,
            kv_size=size,
            layers="0-2",
            calibration=str(folder / "words.txt"),
            calibration_tokens=8192,
            verify=True,
        )
        converted = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        found = measure_fidelity(original, converted, random_ids(16, 64, seed=9))
        details = [layer.details for layer in report.layers]
        row["exactness"] = max(layer.exactness_error or 0.0 for layer in report.layers)
        row["key_regression"] = [item.get("key_regression_error") for item in details]
        row["key_scaling"] = [item.get("key_scaling_error") for item in details]
        row[f"error_{size}"] = sorted(item["refitted_error"] for item in details)[1]
        row[f"kl_{size}"] = found.kl
    return row


def cells(row: dict[str, Any]) -> list[Any]:
    """The row of the table; key errors are those of the worst layer."""
    worst = [
        max((value for value in row[name] if value is not None), default=None)
        for name in ("key_regression", "key_scaling")
    ]
    errors = [row[name] for name in ("error_50%", "kl_50%", "error_25%", "kl_25%")]
    return [row["family"], row["exactness"], *worst, *errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(VARIANTS), help="names of tests/builders.py")
    parser.add_argument("--json", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = machine_facts()
    rows = []
    for variant in arguments.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(variant, Path(folder)))
        print(variant, file=sys.stderr)
    print(describe(machine))
    print(format_table(COLUMNS, [cells(row) for row in rows]))
    write_json(arguments.json, {"machine": machine, "families": rows})


if __name__ == "__main__":
    main()

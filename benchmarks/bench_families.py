"""Every family on a tiny model with random weights: exactness, and the error of conversions to half and a quarter of the cache.

    python benchmarks/bench_families.py [--families qwen3,gemma2] [--json benchmarks/results/families.json]

Random weights have flat spectra, so the errors at 50 % and 25 % say how families compare with each other, not what a trained
model loses. Exactness and the error of the regression of normalised keys do say what they say. Families that normalise keys
have a second row, of the conversion with linear keys in their place (--qk-norm regression). Models are those of
tests/builders.py; calibration on random tokens, measured on others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.evaluate import measure_fidelity
from xeco_convert.options import QK_NORMS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from builders import KEY_NORM, VARIANTS, VOCABULARY, build_checkpoint, random_ids

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


def measure(variant: str, folder: Path, qk_norm: str) -> dict[str, Any]:
    """One family and one form of its normalised keys: the worst layer's exactness, key regression layer by layer, output error
    (median layer) and KL."""
    source = build_checkpoint(folder / "source", variant, tokenizer=True)
    tokens = torch.randint(3, VOCABULARY, (16384,), generator=torch.Generator().manual_seed(5))
    # ids, not words: the tokenizer class of Qwen2 reads no word-level vocabulary
    (folder / "tokens.json").write_text(json.dumps([tokens.tolist()]))
    attention = "eager" if variant == "gemma2" else "sdpa"
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=attention)
    name = variant if qk_norm == "exact" else f"{variant}, {qk_norm}"
    row: dict[str, Any] = {"family": name, "qk_norm": qk_norm}
    for size in ("50%", "25%"):
        output = folder / f"out-{size}"
        report = xeco_convert.convert(
            source,
            output,
            kv_size=size,
            layers="0-2",
            calibration=str(folder / "tokens.json"),
            calibration_tokens=8192,
            verify=True,
            qk_norm=qk_norm,
        )
        converted = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        found = measure_fidelity(original, converted, random_ids(16, 64, seed=9))
        details = [layer.details for layer in report.layers]
        checked = [layer.exactness_error for layer in report.layers]
        assert len(checked) == 3 and None not in checked  # a family that is not checked has no exactness to show
        row["exactness"] = max(error for error in checked if error is not None)
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


def regression_cells(row: dict[str, Any]) -> list[Any]:
    """Key regression of each layer, beside one mean scale for each group."""
    pairs = zip(row["key_regression"], row["key_scaling"], strict=True)
    return [row["family"], *(f"{regression:.4f} / {scaling:.4f}" for regression, scaling in pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(VARIANTS), help="names of tests/builders.py")
    parser.add_argument("--json", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = machine_facts()
    rows = []
    for variant in arguments.families.split(","):
        for qk_norm in QK_NORMS if variant in KEY_NORM else ("exact",):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(variant, Path(folder), qk_norm))
            print(rows[-1]["family"], file=sys.stderr)
    print(describe(machine))
    print(format_table(COLUMNS, [cells(row) for row in rows]))
    normalised = [row for row in rows if row["key_regression"][0] is not None]
    if normalised:
        print("\nnormalised keys, relative error: regression on the input / one mean scale for each group\n")
        print(format_table(["family", "layer 0", "layer 1", "layer 2"], [regression_cells(row) for row in normalised]))
    write_json(arguments.json, {"machine": machine, "families": rows})


if __name__ == "__main__":
    main()

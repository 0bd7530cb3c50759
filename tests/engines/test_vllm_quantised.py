"""Weights in 8 bits by vLLM's own methods: the projections of converted layers are quantised as any model's, kv_b_proj stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import Run
from safetensors.torch import load_file, save_file

import xeco_convert

# attention reads the weight of kv_b_proj, which vLLM would keep in a layout of its own
IGNORED = ["lm_head", "re:.*kv_b_proj"]
SCHEME = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}
PROMPTS = [[1, 5, 6, 7, 8, 20, 40], [300, 301, 450, 20], list(range(100, 140))]
BOUND = 0.15  # of log-probabilities: activations in 8 bits; a projection whose scales are lost is off by more than 1


def quantise(source: Path, in_8_bits: Path, rounded: Path) -> None:
    """Two copies of a converted folder: weights as int8 with a scale for each row (compressed-tensors), and the same numbers in
    the source's dtype."""
    for folder in (in_8_bits, rounded):
        shutil.copytree(source, folder)
    (file,) = source.glob("*.safetensors")
    stored, plain = {}, {}
    for name, weight in load_file(file).items():
        stored[name] = plain[name] = weight
        if name.endswith(("proj.weight", "proj_with_mqa.weight")) and "kv_b_proj" not in name:
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            stored[name] = (weight.float() / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
            plain[name] = (stored[name] * scale).to(weight.dtype)
    save_file(stored, in_8_bits / file.name, metadata={"format": "pt"})
    save_file(plain, rounded / file.name, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": IGNORED,
        "config_groups": {"group_0": SCHEME},
    }
    (in_8_bits / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def served(run_vllm: Run, shared: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in 8 bits, and the one with the same weights in bfloat16."""
    base = tmp_path_factory.mktemp("quantised")
    text = str(shared / "text" / "train.txt")
    xeco_convert.convert(tinystories, base / "out", calibration=text, calibration_tokens=4096, rank=48, rope_dim=24)
    quantise(base / "out", base / "int8", base / "rounded")
    # vLLM's int8 products take activations in 16 bits
    settings = {"max_model_len": 128, "dtype": "bfloat16"}
    jobs = [
        {"folder": str(base / name), "prompts": [PROMPTS], "max_tokens": 1, "settings": settings}
        for name in ("int8", "rounded")
    ]
    return run_vllm(jobs)


def test_weights_in_8_bits_give_the_probabilities_of_what_they_stand_for(served: list[dict[str, Any]]) -> None:
    in_8_bits, rounded = served
    assert "error" not in in_8_bits, in_8_bits["error"]
    for one, other in zip(in_8_bits["requests"], rounded["requests"], strict=True):
        ours, theirs = one["logprobs"][0], other["logprobs"][0]
        shared = ours.keys() & theirs.keys()
        assert len(shared) >= 3
        assert max(abs(ours[token] - theirs[token]) for token in shared) < BOUND

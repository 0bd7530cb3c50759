"""llama.cpp runs exports as the converted model does: its own converter to GGUF, then its generation. Where XECO_LLAMA_CPP_PYTHON
names an interpreter that has xllamacpp, and XECO_LLAMA_CPP the sources with the converter (`scripts/engines.sh llama.cpp` makes
both)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_agreement import PROMPTS, assert_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.export import ExportOptions, export_checkpoint

_HERE = Path(__file__).parent
_LOGPROB_BOUND = (
    5e-2  # both compute in float32 and differ by 0.0004 in the mean; a wrong rotation or scale is off by more than 1
)


@pytest.fixture(scope="session")
def llama_cpp() -> tuple[str, str]:
    """Interpreter, and folder of the sources."""
    python, sources = (os.environ.get(name, "") for name in ("XECO_LLAMA_CPP_PYTHON", "XECO_LLAMA_CPP"))
    if not python or not sources:
        pytest.skip("XECO_LLAMA_CPP_PYTHON and XECO_LLAMA_CPP name no llama.cpp: scripts/engines.sh llama.cpp")
    return python, sources


def command(*arguments: object) -> None:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def in_llama_cpp(engine: tuple[str, str], converted: Path, rows: list[list[int]], tokens: int, work: Path) -> Any:
    """Export, GGUF, generation."""
    export_checkpoint(converted, work / "stock", ExportOptions(target="llama.cpp"))
    command(sys.executable, _HERE / "hf_to_gguf.py", engine[1], work / "stock", work / "model.gguf")
    (work / "ids.json").write_text(json.dumps(rows))
    command(
        engine[0], _HERE / "llama_cpp_greedy.py", work / "model.gguf", work / "ids.json", tokens, work / "result.json"
    )
    return json.loads((work / "result.json").read_text())


def assert_same(converted: Path, rows: list[list[int]], answers: list[dict[str, Any]], tokens: int) -> None:
    """Our greedy tokens, and the probabilities of five of each step."""
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    end = AutoTokenizer.from_pretrained(converted).eos_token_id  # llama.cpp is told to leave it out
    for row, answer in zip(rows, answers, strict=True):
        assert len(answer["ids"]) == tokens
        logprobs = assert_greedy(ours, row, answer["ids"], _LOGPROB_BOUND, [end])
        for step, theirs in zip(logprobs, answer["logprobs"], strict=True):
            assert all(abs(float(step[int(token)]) - value) < _LOGPROB_BOUND for token, value in theirs.items())


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("scaling", "rope_dim"), [("default", 40), ("llama3", 16)])
def test_a_trained_model_writes_the_same_hundred_tokens(
    scaling: str, rope_dim: int, llama_cpp: tuple[str, str], tinystories: Path, shared: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tinystories, source)
    config = json.loads((source / "config.json").read_text())
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    config["rope_parameters"] = {"rope_theta": theta, **SCALINGS[scaling]}
    (source / "config.json").chmod(0o644)
    (source / "config.json").write_text(json.dumps(config))
    converted = tmp_path / "out"
    xeco_convert.convert(
        source,
        converted,
        rank=88,
        rope_dim=rope_dim,
        portable=True,
        dtype="float32",
        init="calibrated",
        calibration=str(shared / "text" / "train.txt"),
        calibration_tokens=4096,
    )
    tokenizer = AutoTokenizer.from_pretrained(converted)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert_same(converted, rows, in_llama_cpp(llama_cpp, converted, rows, 100, tmp_path), 100)

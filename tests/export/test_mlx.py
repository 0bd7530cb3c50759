"""mlx-lm runs exports as the converted model does: where XECO_MLX_PYTHON names an interpreter that can import mlx_lm."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_agreement import PROMPTS, assert_greedy
from test_deepseek_v3 import convert
from test_engines import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.errors import UnsupportedModelError
from xeco_convert.export import ExportOptions, export_checkpoint
from xeco_convert.export.engines import ENGINES

_SCRIPT = Path(__file__).with_name("mlx_greedy.py")


@pytest.fixture(scope="session")
def mlx_python() -> str:
    python = os.environ.get("XECO_MLX_PYTHON", "")
    if not python:
        pytest.skip("XECO_MLX_PYTHON names no interpreter that has mlx-lm (pip install mlx-lm, and mlx[cpu] on Linux)")
    done = subprocess.run([python, "-c", "import mlx_lm, mlx.core"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"XECO_MLX_PYTHON={python} cannot import mlx_lm: {done.stderr[-300:]}")
    return python


def run(python: str, folder: Path, rows: list[list[int]], tokens: int, work: Path) -> dict[str, Any]:
    """What mlx-lm gives for these prompts of token ids."""
    (work / "ids.json").write_text(json.dumps(rows))
    arguments = [str(_SCRIPT), str(folder), str(work / "ids.json"), str(tokens), str(work / "out.json")]
    done = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((work / "out.json").read_text())


def export(converted: Path, output: Path) -> Path:
    export_checkpoint(converted, output, ExportOptions(target="mlx"))
    return output


@pytest.mark.slow
def test_a_trained_model_writes_the_same_hundred_tokens(
    mlx_python: str, tinystories: Path, shared: Path, tmp_path: Path
) -> None:
    calibration = {"calibration": str(shared / "text" / "train.txt"), "calibration_tokens": 4096}
    converted = tmp_path / "out"
    xeco_convert.convert(
        tinystories, converted, rank=88, rope_dim=40, portable=True, dtype="float32", init="calibrated", **calibration
    )
    folder = export(converted, tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert rows == [AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"] for prompt in PROMPTS]
    result = run(mlx_python, folder, rows, 100, tmp_path)
    assert result["cached"] == 88 + 40  # latents, not expanded keys and values
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    for row, tokens, logits in zip(rows, result["tokens"], result["logits"], strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            expected = ours(ids).logits[0]
        assert float((torch.tensor(logits) - expected).abs().max() / expected.std()) < 1e-3
        assert len(tokens) == 100
        assert_greedy(ours, row, tokens, 1e-3)


SCALED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("llama", "default", {"rank": 12, "rope_dim": 8}),
    "llama3": ("llama", "llama3", {"rank": 12, "rope_dim": 4}),
    "linear": ("llama_mqa", "linear", {"rank": 8, "rope_dim": 4}),
    "yarn": ("llama_tied", "yarn", {"rank": 12, "rope_dim": 8}),
}


@pytest.mark.parametrize("case", SCALED)
def test_rotary_scalings_come_out_as_in_transformers(case: str, mlx_python: str, tmp_path: Path) -> None:
    variant, rope, options = SCALED[case]
    converted = convert(tmp_path, variant, rope, **options)
    folder = export(converted, tmp_path / "stock")
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(2))
    result = run(mlx_python, folder, [ids[0, :16].tolist()], 40, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ours(ids[:, :16]).logits[0]
    assert float((torch.tensor(result["logits"][0]) - expected).abs().max() / expected.std()) < 1e-3
    assert result["tokens"][0] == greedy(converted, ids, 40).tolist()


def test_the_scaling_is_where_mlx_lm_looks_for_it(tmp_path: Path) -> None:
    folder = export(convert(tmp_path, "llama", "llama3", rank=12, rope_dim=8), tmp_path / "stock")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"] and config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_theta"] == config["rope_scaling"]["rope_theta"]
    plain = export(convert(tmp_path / "plain", "llama", rank=12, rope_dim=8), tmp_path / "plain_stock")
    assert "rope_scaling" not in json.loads((plain / "config.json").read_text())


def test_what_mlx_lm_would_not_read_is_refused(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", "yarn", rank=12, rope_dim=8)
    config = json.loads((converted / "config.json").read_text())
    config["rope_parameters"]["attention_factor"] = 1.5
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"--target mlx: it does not read attention_factor of .*'yarn'"):
        export(converted, tmp_path / "stock")
    dynamic = convert(tmp_path / "dynamic", "llama", "dynamic", rank=12, rope_dim=8)
    with pytest.raises(UnsupportedModelError, match="--target mlx: rotary type 'dynamic' would not come out"):
        export(dynamic, tmp_path / "stock")


def test_models_whose_layer_61_mlx_lm_would_drop_are_refused() -> None:
    engine = ENGINES.find("mlx", "--target")
    engine.check_layers(61)
    with pytest.raises(
        UnsupportedModelError, match=r"mlx-lm drops the weights of layer 61.*at most 61 layers, found 80"
    ):
        engine.check_layers(80)

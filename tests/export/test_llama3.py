"""Llama 3's rotary scaling leaves the fastest frequencies as they are: a model that rotates at those alone needs no scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, build_checkpoint, random_ids
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import xeco_convert
from xeco_convert.cli import main
from xeco_convert.errors import UnsupportedModelError
from xeco_convert.export import ExportOptions, export_checkpoint
from xeco_convert.export.engines import ENGINES
from xeco_convert.families.spec import unscaled_frequencies

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# 3 of 8 frequencies turn within 32 tokens
TINY = LLAMA_3_1 | {"rope_theta": 100.0, "original_max_position_embeddings": 128}


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_checkpoint(tmp_path_factory.mktemp("llama3") / "source", "llama", tokenizer=True, head_dim=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": TINY}))
    words = torch.randint(3, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(5))
    (folder.parent / "words.txt").write_text(" ".join(f"w{number}" for number in words.tolist()))
    return folder


def convert(source: Path, output: Path, **options: Any) -> Path:
    text = {"calibration": str(source.parent / "words.txt"), "calibration_tokens": 1024}
    xeco_convert.convert(source, output, portable=True, **text, **options)
    return output


@pytest.fixture(scope="module")
def converted(llama3: Path) -> Path:
    return convert(llama3, llama3.parent / "out", rank=12)


def rotary_numbers(folder: Path) -> list[list[int]]:
    return [layer["rope_index"] for layer in json.loads((folder / "config.json").read_text())["mla_layers"]]


@pytest.mark.parametrize(("head_dim", "expected"), [(128, 29), (64, 15)])
@pytest.mark.parametrize("settings", [LLAMA_3_1, LLAMA_3_1 | {"factor": 32.0}])
def test_the_frequencies_that_llama_3_leaves_alone_are_counted_as_transformers_computes_them(
    settings: dict[str, Any], head_dim: int, expected: int
) -> None:
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = settings["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    same = torch.isclose(scaled, plain, rtol=1e-5)
    assert same.tolist() == [True] * expected + [False] * (head_dim // 2 - expected)
    assert unscaled_frequencies(settings, head_dim) == expected


def test_other_scalings_count_as_touching_all() -> None:
    assert unscaled_frequencies({"rope_type": "default"}, 64) == 32
    assert unscaled_frequencies({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 64) == 0


@pytest.mark.parametrize("target", ENGINES.names())
def test_a_portable_llama_3_is_exported_without_scaling_and_computes_the_same(
    target: str, converted: Path, tmp_path: Path
) -> None:
    assert rotary_numbers(converted) == [[0, 1, 2]] * 3
    report = export_checkpoint(converted, tmp_path / "stock", ExportOptions(target=target))
    assert report.comparison.logits_difference < 2e-4  # 3e-5 to 6e-5 observed
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens
    settings = json.loads((tmp_path / "stock" / "config.json").read_text())["rope_parameters"]
    assert settings == {"rope_type": "default", "rope_theta": pytest.approx(100.0 ** (report.qk_rope_head_dim / 16))}


def test_the_converted_model_still_has_its_scaling(converted: Path, tmp_path: Path) -> None:
    """In it, later frequencies are scaled: without the type the source's others would turn differently."""
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    assert ours.config.rope_parameters["rope_type"] == "llama3"
    export_checkpoint(converted, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    ids = random_ids(2, 60)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=1e-4, atol=4e-4)


def test_a_budget_is_split_within_those_frequencies(llama3: Path, tmp_path: Path) -> None:
    converted = convert(llama3, tmp_path / "out", kv_size="50%")
    assert all(index == list(range(len(index))) and len(index) <= 3 for index in rotary_numbers(converted))
    export_checkpoint(converted, tmp_path / "stock", ExportOptions(target="llama.cpp"))


def test_wider_rotary_keys_are_for_engines_that_know_the_scaling(llama3: Path, tmp_path: Path) -> None:
    converted = convert(llama3, tmp_path / "out", rank=12, rope_dim=8)
    export_checkpoint(converted, tmp_path / "stock")
    settings = json.loads((tmp_path / "stock" / "config.json").read_text())["rope_parameters"]
    assert settings["rope_type"] == "llama3"
    with pytest.raises(UnsupportedModelError, match=r"'llama3' would not come out .*--rope-dim 6 at most"):
        export_checkpoint(converted, tmp_path / "vllm", ExportOptions(target="vllm"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "rotary frequencies: only the 3 of 8 that rotary type llama3 leaves as they are"),
        (["--rope-dim", "8"], "note: rotary type llama3 scales some of the frequencies that --rope-dim 8 takes"),
    ],
)
def test_the_plan_says_which_frequencies_it_takes(
    options: list[str], sentence: str, llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(llama3), str(tmp_path / "out"), "--portable", "--rank", "12", "--dry-run", *options])
    assert end.value.code in (0, None)
    assert sentence in capsys.readouterr().out

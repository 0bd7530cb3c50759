"""Every family as a tiny random model in vLLM on the CPU against this project's own model, or the sentence that refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import VARIANTS, build_checkpoint, random_ids
from generation import Run, assert_same_generation, own_generation

import xeco_convert
from xeco_convert.vllm.support import FAMILIES

# heads that vLLM's CPU attention takes in kept layers; not hidden_size / heads, as Qwen3 and Gemma have them
SIZES = {"hidden_size": 64, "head_dim": 32}
MAX_TOKENS = 12
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 18, 33)]
KEPT = {"gemma2": "1", "gemma3": "1,2", "smollm3": "0", "qwen2": "0,2", "mixtral": "1", "granite": "0,1"}
# vLLM's own Qwen2 divides hidden_size by the heads, whatever head_dim says: that is refused where layers are kept.
DIVIDED = {"qwen2": {"hidden_size": 128}}
OWN_HEADS = "qwen2, kept heads of their own size"
# By vLLM itself, before a layer is built: what its sentence says.
REFUSED_BY_VLLM = {"qwen2_window": "Sliding window for some but all layers is not supported"}
NOT_SERVED = (OWN_HEADS, *REFUSED_BY_VLLM)
# With tied embeddings these random models repeat their first token, and write no text to calibrate on.
UNTIED = {variant: {"tie_word_embeddings": False} for variant in ("qwen3_bias", "phi3_partial")}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{variant: (variant, "0-2", UNTIED.get(variant, {})) for variant in VARIANTS if variant != "qwen2_tied"},
    **{f"{variant}, layers {layers}": (variant, layers, DIVIDED.get(variant, {})) for variant, layers in KEPT.items()},
    OWN_HEADS: ("qwen2", "0,2", {}),
    **{f"llama, {rope} rotary": ("llama", "0-2", {"rope": rope}) for rope in ("linear", "llama3", "yarn")},
}
SERVED = [
    name
    for name, (variant, _, _) in CASES.items()
    if not FAMILIES[VARIANTS[variant]["model_type"]].refusal and name not in NOT_SERVED
]
REFUSED = [name for name in CASES if name not in SERVED and name not in NOT_SERVED]


def convert(base: Path, name: str) -> Path:
    variant, layers, settings = CASES[name]
    sizes = {**SIZES, "num_hidden_layers": 3, **settings}
    if variant == "olmo2" or variant.startswith("gpt_neox"):
        sizes = settings
    source = build_checkpoint(base / "source", variant, **sizes)
    xeco_convert.convert(source, base / "out", rank=24, rope_dim=12, calibration_tokens=8192, layers=layers)
    return base / "out"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: convert(tmp_path_factory.mktemp("family"), name) for name in CASES}


@pytest.fixture(scope="module")
def served(run_vllm: Run, folders: dict[str, Path]) -> dict[str, Any]:
    jobs = [
        {"folder": str(folder), "prompts": [PROMPTS], "max_tokens": MAX_TOKENS, "settings": {"max_model_len": 64}}
        for folder in folders.values()
    ]
    return dict(zip(folders, run_vllm(jobs), strict=True))


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_the_converted_model(
    name: str, served: dict[str, Any], folders: dict[str, Path], record: dict[str, dict[str, Any]]
) -> None:
    model_type = VARIANTS[CASES[name][0]]["model_type"]
    same = assert_same_generation(own_generation(folders[name], PROMPTS, MAX_TOKENS), served[name])
    record[name] = {"model_type": model_type, **same}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_in_one_sentence(name: str, served: dict[str, Any]) -> None:
    assert FAMILIES[VARIANTS[CASES[name][0]]["model_type"]].refusal in served[name]["error"]


@pytest.mark.parametrize("name", REFUSED_BY_VLLM)
def test_what_vllm_refuses_itself_is_said(name: str, served: dict[str, Any]) -> None:
    assert REFUSED_BY_VLLM[name] in served[name]["error"]


def test_kept_heads_that_vllm_would_build_in_another_size_are_refused(served: dict[str, Any]) -> None:
    assert (
        "layer 1 keeps its source's attention, with heads of 32, and vLLM's Qwen2Attention"
        in served[OWN_HEADS]["error"]
    )

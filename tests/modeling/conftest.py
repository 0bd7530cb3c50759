"""Converted models by name, loaded from the files that xeco-convert writes; made once, and not to be changed by tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_checkpoint, exact_model, source_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import xeco_convert

# name -> (variant, rotary type, options of the conversion); None: the exact form, which keeps the source's rotary tables
KINDS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "llama": ("llama", "default", {"rank": 12, "rope_dim": 4}),
    "llama_exact": ("llama", "llama3", None),
    "llama_yarn_norm": ("llama_bias", "yarn", {"rank": 12, "rope_dim": 4, "latent_norm": True}),
    "llama_all_rotary": ("llama_mha", "linear", {"rank": 16, "rope_dim": 8}),
    "mistral_window": ("mistral_window", "default", {"rank": 12, "rope_dim": 4}),
    "qwen2_low_rank_queries": ("qwen2", "default", {"rank": 12, "rope_dim": 4, "q_rank": 20}),
    "qwen2_window": ("qwen2_window", "default", {"rank": 12, "rope_dim": 4, "nope_dim": 8}),
    "qwen3_exact": ("qwen3_bias", "yarn", None),  # keys behind their norm
    "bit_planes": ("llama", "default", {"rank": 16, "rope_dim": 8, "cache_bits": "3"}),
    "four_bits": ("qwen2_tied", "default", {"rank": 12, "rope_dim": 4, "layers": "0,2", "cache_bits": "4"}),
    "hybrid": ("qwen2_tied", "default", {"rank": 12, "rope_dim": 4, "layers": "0,2"}),
}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Source and converted folder of a kind."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            variant, rope, options = KINDS[kind]
            assert options is not None
            base = tmp_path_factory.mktemp(kind)
            source = build_checkpoint(base / "source", variant, rope)
            xeco_convert.convert(source, base / "converted", init="paper", **options)
            made[kind] = (source, base / "converted")
        return made[kind]

    return make


@pytest.fixture(scope="session")
def model_of(folder_of: Callable[[str], tuple[Path, Path]]) -> Callable[[str], PreTrainedModel]:
    """A converted model in float32, in evaluation mode."""
    made: dict[str, PreTrainedModel] = {}

    def make(kind: str) -> PreTrainedModel:
        if kind not in made:
            variant, rope, options = KINDS[kind]
            if options is None:
                made[kind] = exact_model(source_model(variant, rope))
            else:
                made[kind] = AutoModelForCausalLM.from_pretrained(folder_of(kind)[1]).eval()
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, model_of: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Every kind of converted model in turn."""
    found: PreTrainedModel = model_of(request.param)
    return found


@pytest.fixture
def tolerance(model: PreTrainedModel) -> float:
    """How far two implementations may differ, in float32 and relative to the logits' standard deviation: 5e-6 was observed over
    all cases. Where a cache holds codes, a difference of rounding can move a number to the next code: 2e-3 was observed."""
    return 1e-2 if is_packed(model) else 2e-5


def is_packed(model: PreTrainedModel) -> bool:
    """Whether a model caches codes."""
    return any(getattr(module, "is_packed", False) for module in model.modules())


@pytest.fixture
def decode_op(model: PreTrainedModel) -> str:
    """The op that decodes with a model's cache."""
    return "latent_attention_packed" if is_packed(model) else "latent_attention_decode"


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Any:
    """No graphs, except in tests marked by the fixture `gradients`."""
    if "gradients" in request.fixturenames:
        yield
    else:
        with torch.no_grad():
            yield


@pytest.fixture
def gradients() -> None:
    """Asks for gradients in a test."""

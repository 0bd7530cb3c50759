"""The tables of docs/serving.md are those that scripts/serving_tables.py makes, and count what they say."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig

from xeco_convert.families import supported_model_types
from xeco_convert.vllm.support import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_tables", ROOT / "scripts" / "serving_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_tables"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_as_they_are_now(tables: ModuleType) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.with_tables(page) == page, "run scripts/serving_tables.py"


def test_the_matrix_names_the_class_or_the_reason_of_every_family(tables: ModuleType) -> None:
    rows = tables.support_matrix({}).splitlines()[2:]
    assert len(rows) == len(FAMILIES) == len(supported_model_types())
    for row in rows:
        family = FAMILIES[row.split("`")[1]]
        assert (family.class_name or family.refusal) in row
    assert any("q_proj, k_proj, v_proj" in row for row in rows)  # biases of Qwen2, which no export holds


def test_a_record_is_summed_over_the_models_of_a_family(tables: ModuleType) -> None:
    record = {
        "one": {"model_type": "llama", "tokens": 36, "logprob_difference": 1.2e-6},
        "two": {"model_type": "llama", "tokens": 24, "logprob_difference": 3.1e-6},
        "three": {"model_type": "qwen2", "tokens": 12, "logprob_difference": 9e-6},
    }
    assert tables.last_run("llama", record) == "60 of 60 (4e-6)"
    assert tables.last_run("granite", record) == "–"


@pytest.mark.parametrize("gpus", [1, 2, 16])
def test_sizes_follow_from_the_configuration(gpus: int, tables: ModuleType) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=256, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=8
    )
    spec = supported_model_types()["llama"]
    source = tables.source_sizes(spec, config, 10_000_000, gpus)
    assert source.cache_numbers == 3 * 2 * 8 * 16
    assert source.gpu_cache_numbers == source.cache_numbers / min(gpus, 8)  # a head lies on one GPU, or on several
    layer = tables.converted_layer(spec, config, 0.5)
    assert layer.cache_width == 128 and layer.qk_rope_head_dim == tables.ROPE_DIM
    converted = tables.converted_sizes(spec, config, 10_000_000, gpus, layer)
    assert converted.cache_numbers == converted.gpu_cache_numbers == 3 * 128
    whole = 3 * layer.cache_width * 256
    tensors = sum(math.prod(size) for size in layer.in_model(config).tensors().values())
    source_attention = 2 * (16 + 8) * 16 * 256
    rest = 10_000_000 + 3 * (tensors - source_attention) - whole
    assert converted.gpu_weight_bytes == pytest.approx(2 * (rest / gpus + whole))


def test_what_leaves_no_room_holds_no_sequence(tables: ModuleType) -> None:
    full = tables.Sizes(cache_numbers=1, gpu_cache_numbers=1, gpu_weight_bytes=80 * 2**30)
    assert full.sequences(8192) == 0

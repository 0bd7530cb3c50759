"""A real converted checkpoint in vLLM on the CPU against this project's own model: the same tokens, the true cache size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generation import Run, assert_same_generation, own_generation
from transformers import AutoTokenizer

import xeco_convert
from xeco_convert.inspect_checkpoint import inspect_checkpoint

PROMPTS = (
    "once upon a time there was a little girl named lily",
    "the dog ran to the park and",
    "tom had a big red ball . he liked to",
    'one day , mom said "',
    "it was a sunny day and the birds",
)
MAX_TOKENS = 100
KINDS: dict[str, dict[str, Any]] = {
    "per-layer ranks": {"kv_size": "25%"},
    "kept layers": {"rank": 48, "rope_dim": 24, "layers": "0,2,4"},
    "latent norm": {"kv_size": "50%", "portable": True},
}


@pytest.fixture(scope="module")
def folders(shared: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("served")
    text = str(shared / "text" / "train.txt")
    for name, options in KINDS.items():
        xeco_convert.convert(tinystories, base / name, calibration=text, **options)
    return {name: base / name for name in KINDS}


@pytest.fixture(scope="module")
def prompts(tinystories: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    return [tokenizer(text).input_ids for text in PROMPTS]


def job(folder: Path, batches: list[list[list[int]]], **settings: Any) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "prompts": batches,
        "max_tokens": MAX_TOKENS,
        "settings": {"max_model_len": 512, **settings},
    }


@pytest.fixture(scope="module")
def served(run_vllm: Run, folders: dict[str, Path], prompts: list[list[int]], tinystories: Path) -> dict[str, Any]:
    """Every kind, the source, and one with its prompts in parts and a second time."""
    long = [prompt * 8 for prompt in prompts]
    jobs = [job(folder, [prompts]) for folder in folders.values()]
    jobs.append(job(tinystories, [prompts]))
    jobs.append(job(folders["per-layer ranks"], [long, long], max_num_batched_tokens=64, block_size=32))
    names = [*folders, "source", "in parts"]
    return dict(zip(names, run_vllm(jobs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_converted_model(
    kind: str, served: dict[str, Any], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    assert_same_generation(own_generation(folders[kind], prompts, MAX_TOKENS), served[kind])


def test_chunked_prefill_and_cached_prefixes_change_nothing(
    served: dict[str, Any], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    expected = own_generation(folders["per-layer ranks"], [prompt * 8 for prompt in prompts], MAX_TOKENS)
    assert_same_generation([*expected, *expected], served["in parts"])
    cached = [request["cached"] for request in served["in parts"]["requests"]]
    assert all(count >= 32 for count in cached[len(prompts) :])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_as_many_more_tokens_as_latents_are_smaller(
    kind: str, served: dict[str, Any], folders: dict[str, Path]
) -> None:
    sizes = inspect_checkpoint(folders[kind])
    expected = sizes["kv_bytes_before"] / sizes["kv_bytes_after"]
    assert served[kind]["tokens_per_gib"] / served["source"]["tokens_per_gib"] == pytest.approx(expected, rel=0.02)


def test_tensor_parallel_ranks_share_the_heads(
    run_vllm: Run, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    folder = folders["per-layer ranks"]
    (result,) = run_vllm(
        [job(folder, [prompts], tensor_parallel_size=2)],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert_same_generation(own_generation(folder, prompts, MAX_TOKENS), result)


def test_a_folder_whose_widths_were_lost_is_refused_in_one_sentence(
    run_vllm: Run, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    overrides = {"hf_overrides": {"mla_layers": None}}
    results = run_vllm([job(folders["per-layer ranks"], [prompts], **overrides)])
    assert "not a folder that xeco-convert wrote" in results[0]["error"]

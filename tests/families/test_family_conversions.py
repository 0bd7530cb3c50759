"""Every family from end to end on a tiny random checkpoint: converted, loaded, generated from, saved again, trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import KEY_NORM, VARIANTS, VOCABULARY, build_checkpoint, make_key_norms_constant, random_ids
from plots import rendered
from transformers import AutoModelForCausalLM, PreTrainedModel

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.report import ConversionReport
from xeco_convert.source import open_source

FAMILIES = [variant for variant in VARIANTS if not variant.startswith(("llama", "mistral", "qwen2"))]
LAYERS = {"layers": "0-2"}
Converted = tuple[Path, Path, ConversionReport]


def convert(source: Path, output: Path, **options: object) -> ConversionReport:
    """On random words: what these models write themselves does not reach all directions of their inputs."""
    text = source.parent / "words.txt"
    words = torch.randint(3, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(5))
    text.write_text(" ".join(f"w{number}" for number in words.tolist()))
    settings = {"verify": True, "calibration": str(text), "calibration_tokens": 2048, **LAYERS, **options}
    return xeco_convert.convert(source, output, **settings)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    made: dict[str, Converted] = {}

    def make(variant: str) -> Converted:
        if variant not in made:
            base = tmp_path_factory.mktemp(variant)
            source = build_checkpoint(base / "source", variant, tokenizer=True)
            with rendered():
                made[variant] = (source, base / "out", convert(source, base / "out", rank=12, rope_dim=4))
        return made[variant]

    return make


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_conversion_is_verified(variant: str, converted: Callable[[str], Converted]) -> None:
    _, folder, report = converted(variant)
    assert all(layer.exactness_error < 1e-5 for layer in report.layers)
    assert not any("key_regression_error" in layer.details for layer in report.layers)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"].startswith("xeco_")
    assert all((entry["k_norm"] is not None) == (variant in KEY_NORM) for entry in config["mla_layers"])


@pytest.mark.parametrize("variant", KEY_NORM)
def test_linear_keys_in_place_of_normalised_ones_are_made_on_request(variant: str, tmp_path: Path) -> None:
    """For engines that know a plain kv_a projection alone; the report says what the keys lose."""
    source = build_checkpoint(tmp_path / "source", variant, tokenizer=True)
    report = convert(source, tmp_path / "out", rank=24, rope_dim=8, qk_norm="regression", verify=True)
    assert all(layer.exactness_error < 1e-5 for layer in report.layers)
    for layer in report.layers:  # no worse than one mean scale for each group
        assert 0 < layer.details["key_regression_error"] <= layer.details["key_scaling_error"]
    model = load(tmp_path / "out")
    assert all(model.config.layer(number).k_norm is None for number in range(3))
    assert not any("k_norm" in name or "k_proj" in name for name in model.state_dict())


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_generation_caches_latents_alone_and_equals_a_run_without_a_cache(
    variant: str, converted: Callable[[str], Converted]
) -> None:
    model, ids = load(converted(variant)[1]), random_ids(2, 9)
    output = model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    for index, layer in enumerate(output.past_key_values.layers):
        widths = model.config.layer(index)
        assert layer.keys.shape[-1] == widths.kv_lora_rank and layer.values.shape[-1] == widths.qk_rope_head_dim
        assert layer.keys.shape[1] == layer.values.shape[1] == 1
    logits = model(output.sequences[:, :-1], use_cache=False).logits[:, 8:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, rtol=1e-4, atol=1e-4)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static")
    assert torch.equal(static, output.sequences)


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_a_left_padded_batch_gives_what_each_text_gives_alone(
    variant: str, converted: Callable[[str], Converted]
) -> None:
    model, ids = load(converted(variant)[1]), random_ids(1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_converted_model_survives_saving_and_learns(
    variant: str, converted: Callable[[str], Converted], tmp_path: Path
) -> None:
    model, ids = load(converted(variant)[1]), random_ids(2, 12)
    with torch.no_grad():
        before = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, before, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
    first = again.train()(ids, labels=ids).loss
    first.backward()
    trained = [p for name, p in again.named_parameters() if "kv_" in name and name.endswith("weight")]
    assert len(trained) == 6 and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    optimizer.step()
    assert again(ids, labels=ids).loss < first


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAMILIES)
def test_full_width_is_the_source(variant: str, tmp_path: Path) -> None:
    """The latent holds whatever keys and values hold, and every rotary row has its slot."""
    source = build_checkpoint(tmp_path / "source", variant, tokenizer=True)
    model = open_source(CheckpointIndex.open(source))
    geometry, kind = model.geometry, model.kinds[0]
    rank = geometry.cache_width if variant in KEY_NORM else min(geometry.cache_width, geometry.hidden_size)
    rope = geometry.num_key_value_heads * kind.rotary_dim
    convert(source, tmp_path / "out", rank=rank, rope_dim=rope)
    kind = "eager" if variant == "gemma2" else "sdpa"
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=kind).eval()
    model, ids = load(tmp_path / "out"), random_ids(2, 40)
    with torch.no_grad():
        expected = original(ids).logits
        error = float((model(ids).logits - expected).norm() / expected.norm())
    assert error < (
        1e-5 if variant in KEY_NORM else 1e-3
    )  # as the input spans fewer directions than κ, some are rounding


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "smollm3", "gpt_neox", "qwen3", "qwen3_moe"])
def test_a_kv_budget_is_split_over_the_layers_of_a_family(variant: str, tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", variant, tokenizer=True)
    report = convert(source, tmp_path / "out", kv_size="50%", layers=None, verify=False)
    assert 0.3 < report.kv_share <= 0.5
    load(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe", "gemma3"])
def test_normalised_keys_are_exact_where_their_regression_is(variant: str, tmp_path: Path) -> None:
    heads = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = build_checkpoint(tmp_path / "source", variant, tokenizer=True, **heads)
    make_key_norms_constant(source, 1.0 if variant == "gemma3" else 0.0)
    report = convert(source, tmp_path / "out", rank=32, rope_dim=64, qk_norm="regression")
    assert all(layer.details["key_regression_error"] < 1e-6 for layer in report.layers)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model, ids = load(tmp_path / "out"), random_ids(2, 40)
    with torch.no_grad():
        expected = original(ids).logits
        assert float((model(ids).logits - expected).norm() / expected.norm()) < 5e-3

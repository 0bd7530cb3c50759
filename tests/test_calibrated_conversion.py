"""xeco_convert.convert with the calibrated initialisation, end to end: exact at full width, within its budget, repeatable,
and close to the embedded pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROPES, VARIANTS, build_checkpoint, random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

import xeco_convert
from xeco_convert.calibration.text import read_windows
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text
from xeco_convert.evaluate import Fidelity, measure_fidelity
from xeco_convert.report import ConversionReport

pytestmark = pytest.mark.usefixtures("without_plots")
GROUPS = {"llama_mha": 4, "llama_mqa": 1}
# the other families are in tests/families, with what each of them allows
CASES = [(variant, 1) for variant in VARIANTS if variant.startswith(("llama_", "mistral_", "qwen2_"))] + [("qwen2", 3)]


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random token ids for the tiny checkpoints: windows of 64 tokens."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.json"
    file.write_text(json.dumps(random_ids(40, 64, seed=9).tolist()))
    return file


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories of the demo model's language: a text a line."""
    file = tmp_path_factory.mktemp("story") / "stories.txt"
    file.write_text(generate_text(400, seed=77))
    return file


# factorised queries are the same code in every family: two of them suffice, both with biases
WITH_FACTORISED_QUERIES = [(*case, 32) for case in CASES if case[0] in ("llama_bias", "qwen2")]


@pytest.mark.parametrize(("variant", "shards", "q_rank"), [(*case, None) for case in CASES] + WITH_FACTORISED_QUERIES)
def test_full_widths_are_the_source(
    variant: str, shards: int, q_rank: int | None, tokens: Path, tmp_path: Path
) -> None:
    """Every rank and rotary component, and queries of full rank: the logits of the source, and text of its own."""
    source = build_checkpoint(tmp_path / "in", variant, num_shards=shards, tokenizer=True)
    width = GROUPS.get(variant, 2) * (12 if variant == "llama_wide_heads" else 8)
    xeco_convert.convert(
        source,
        tmp_path / "out",
        rank=min(32, 2 * width),
        rope_dim=width,
        q_rank=q_rank,
        calibration=str(tokens),
        calibration_tokens=1024,
        verify=True,
    )
    before, after = loaded(source), loaded(tmp_path / "out")
    ids = random_ids(2, 24, seed=3)
    with torch.no_grad():
        expected, found = before(ids).logits, after(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 2e-3
    made = after.generate(ids[:, :6], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert made.shape == (2, 11)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_full_widths_are_the_source_with_every_rotary_scaling(
    variant: str, rope: str, tokens: Path, tmp_path: Path
) -> None:
    source = build_checkpoint(tmp_path / "in", variant, rope, tokenizer=True)
    common = {"calibration": str(tokens), "calibration_tokens": 1024}
    xeco_convert.convert(source, tmp_path / "out", rank=32, rope_dim=16, **common)
    ids = random_ids(2, 15, seed=3)  # within the positions where the dynamic type keeps its frequencies
    with torch.no_grad():
        expected, found = loaded(source)(ids).logits, loaded(tmp_path / "out")(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize(
    ("options", "sampled"), [({"kv_size": "50%"}, True), ({"rank": 8, "refine": True, "refine_steps": 3}, False)]
)
def test_the_same_seed_gives_the_same_bytes(
    options: dict[str, Any], sampled: bool, llama: Path, tokens: Path, tmp_path: Path
) -> None:
    text = None if sampled else str(tokens)
    for name in ("first", "second"):
        xeco_convert.convert(llama, tmp_path / name, calibration=text, calibration_tokens=1024, **options)
    first, second = (
        {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir()) if file.is_file()}
        for name in ("first", "second")
    )
    assert first == second


def cached(report: ConversionReport) -> list[int]:
    return [layer.kv_numbers_after for layer in report.layers]


@pytest.mark.parametrize(("share", "multiple"), [("0.25", None), ("75%", 4), ("100%", 8)])
def test_a_kv_size_is_met_in_multiples(
    share: str, multiple: int | None, llama: Path, tokens: Path, tmp_path: Path
) -> None:
    report = xeco_convert.convert(
        llama,
        tmp_path / "out",
        kv_size=share,
        rank_multiple=multiple,
        calibration=str(tokens),
        calibration_tokens=1024,
    )
    limit = {"50%": 0.5, "0.25": 0.25, "75%": 0.75, "25%": 0.25, "100%": 1.0}[share]
    assert 0.7 * limit <= report.kv_share <= limit
    step = multiple or 2
    for layer in report.layers:
        assert layer.kv_lora_rank is not None and layer.qk_rope_head_dim is not None
        assert layer.kv_lora_rank % step == 0 and layer.qk_rope_head_dim % max(2, step // 2) == 0
        assert layer.kv_numbers_after == layer.kv_lora_rank + layer.qk_rope_head_dim
    model = loaded(tmp_path / "out")
    assert [entry["kv_lora_rank"] for entry in model.config.mla_layers] == [
        layer.kv_lora_rank for layer in report.layers
    ]
    with torch.no_grad():
        assert bool(model(random_ids(1, 20)).logits.isfinite().all())


def test_bytes_per_token_are_the_same_as_a_share(llama: Path, tokens: Path, tmp_path: Path) -> None:
    common = {"calibration": str(tokens), "calibration_tokens": 1024}
    by_bytes = xeco_convert.convert(llama, tmp_path / "a", kv_bytes_per_token=3 * 16 * 4, **common)
    by_share = xeco_convert.convert(llama, tmp_path / "b", kv_size="50%", **common)
    assert by_bytes.kv_bytes_after <= 3 * 16 * 4
    assert by_bytes.layers == by_share.layers


def test_a_budget_holds_for_the_whole_model_where_layers_are_kept(llama: Path, tokens: Path, tmp_path: Path) -> None:
    report = xeco_convert.convert(
        llama, tmp_path / "out", kv_size="75%", layers="0,2", calibration=str(tokens), calibration_tokens=1024
    )
    assert report.kv_share <= 0.75 and cached(report)[1] == 32
    assert report.layers[1].kv_lora_rank is None
    assert loaded(tmp_path / "out").config.mla_layers[1] is None


def test_energy_gives_more_rank_for_more_of_it(llama: Path, tokens: Path, tmp_path: Path) -> None:
    ranks = {}
    for energy in (0.3, 0.9, 1.0):
        report = xeco_convert.convert(
            llama, tmp_path / str(energy), energy=energy, calibration=str(tokens), calibration_tokens=1024
        )
        ranks[energy] = [layer.kv_lora_rank for layer in report.layers]
        assert all(rank % 8 == 0 for rank in ranks[energy] if rank is not None)
    assert sum(ranks[0.3]) < sum(ranks[0.9]) <= sum(ranks[1.0]) == 3 * 32  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [{"latent_norm": True}, {"dtype": "bfloat16", "q_rank": 12}])
def test_refinement_lowers_the_held_out_error_or_keeps_the_start(
    extra: dict[str, Any], llama: Path, tokens: Path, tmp_path: Path
) -> None:
    report = xeco_convert.convert(
        llama,
        tmp_path / "out",
        rank=12,
        rope_dim=4,
        calibration=str(tokens),
        calibration_tokens=1536,
        refine=True,
        refine_steps=20,
        **extra,
    )
    for layer in report.layers:
        errors = layer.details["refine_errors"]
        assert set(errors) == {"start", "refit", "scores", "regression"}
        assert errors[layer.details["refine_kept"]] == min(errors.values())
    with torch.no_grad():
        assert bool(loaded(tmp_path / "out")(random_ids(1, 20)).logits.isfinite().all())


def test_refinement_stops_by_the_clock(llama: Path, tokens: Path, tmp_path: Path) -> None:
    """A million steps would take hours; three layers share a twentieth of a minute, with a second attempt at most."""
    report = xeco_convert.convert(
        llama,
        tmp_path / "out",
        rank=12,
        calibration=str(tokens),
        calibration_tokens=1024,
        refine=True,
        refine_steps=10**6,
        refine_minutes=0.01,
    )
    assert report.seconds < 300  # a busy machine may need minutes for what takes seconds


def demo_fidelity(folder: Path, windows: torch.Tensor) -> Fidelity:
    return measure_fidelity(loaded(MODEL_FOLDER), loaded(folder), windows)


def test_the_demo_model_keeps_its_quality_and_the_report_says_so(story: Path, tmp_path: Path) -> None:
    """At half its cache: the report's figures are those of whole models on the same windows, the published initialisation
    is far off, and refinement comes closer still."""
    common = {"calibration": str(story), "calibration_tokens": 2048, "dtype": "float32"}
    report = xeco_convert.convert(MODEL_FOLDER, tmp_path / "calibrated", kv_size="50%", **common)
    assert report.kv_share <= 0.5
    windows = read_windows(str(story), MODEL_FOLDER, length=512, num_tokens=2048 + 8 * 512)
    measured = windows.ids[4:]
    assert bool(windows.counts[4:].all()) and measured.shape[0] == 8
    fidelity, found = demo_fidelity(tmp_path / "calibrated", measured), report.summary["fidelity"]
    assert found["num_tokens"] == fidelity.num_tokens and found["num_windows"] == fidelity.num_windows
    for name in ("perplexity_source", "perplexity", "kl"):
        assert found[name] == pytest.approx(getattr(fidelity, name), rel=1e-3), name
    assert found["top1"] == pytest.approx(fidelity.top1, abs=2e-3)
    assert report.summary["calibration_tokens"] == 2048

    paper = xeco_convert.convert(MODEL_FOLDER, tmp_path / "paper", init="paper", rank=48, rope_dim=16, dtype="float32")
    assert paper.kv_share == 0.5
    published = demo_fidelity(tmp_path / "paper", measured)
    assert fidelity.gap < 0.25 * published.gap and fidelity.kl < 0.25 * published.kl

    widths = {**common, "rank": 48, "rope_dim": 16, "calibration_tokens": 1024}
    refined = xeco_convert.convert(MODEL_FOLDER, tmp_path / "refined", refine=True, refine_steps=8, **widths)
    plain = xeco_convert.convert(MODEL_FOLDER, tmp_path / "plain", **widths)
    assert refined.summary["fidelity"]["kl"] < 0.75 * plain.summary["fidelity"]["kl"]  # 0.51 observed

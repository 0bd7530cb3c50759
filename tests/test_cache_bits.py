"""--cache-bits from the options to the files: what is chosen, counted and said, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, build_checkpoint, random_ids, write_json
from fresh import run_command
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import OptionError, UnsupportedModelError
from xeco_convert.export import export_checkpoint
from xeco_convert.export.options import ExportOptions
from xeco_convert.families import supported_model_types
from xeco_convert.inspect_checkpoint import inspect_checkpoint
from xeco_convert.modeling.layer_xeco import MlaLayer
from xeco_convert.ops.extension import takes_codes
from xeco_convert.options import CACHE_BITS, ConvertOptions
from xeco_convert.plan import make_plan
from xeco_convert.vllm.support import ServingSettings, check_layer

pytestmark = pytest.mark.usefixtures("without_plots")
VARIANT_OF = {"gemma3_text": "gemma3", "phi3": "phi3_partial"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tokens") / "tokens.json"
    write_json(file, torch.randint(3, VOCABULARY, (28, 40), generator=torch.Generator().manual_seed(7)).tolist())
    return str(file)


@pytest.fixture(scope="module")
def convert(tokens: str) -> Callable[..., Any]:
    settings = {"calibration": tokens, "calibration_tokens": 1024}
    return lambda source, output, **options: xeco_convert.convert(source, output, **settings, **options)


def cached_bytes(folder: Path) -> list[int]:
    """What each layer really holds for a token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        cache = model(random_ids(1, 5), use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in pair) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("family", supported_model_types())
@pytest.mark.parametrize("bits", ["8", "4", "3"])
def test_every_family_is_cached_in_codes(family: str, bits: str, convert: Callable[..., Any], tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", VARIANT_OF.get(family, family), tokenizer=True)
    rope = 8 if bits == "3" else 4
    report = convert(source, tmp_path / "out", rank=16, rope_dim=rope, cache_bits=bits, verify=True)
    held, planned = cached_bytes(tmp_path / "out"), [layer.kv_bytes_after for layer in report.layers]
    converted = [layer for layer in report.layers if layer.latent_bits is not None]
    rope_bits = CACHE_BITS[bits][0][1]
    assert converted and all(layer.bits == f"{bits} + {rope_bits}" for layer in converted)
    for layer in converted:
        rope = layer.qk_rope_head_dim or 0
        size = layer.kv_lora_rank * int(bits) // 8 + 2 + (rope * rope_bits // 8 + 2 if rope else 0)
        assert held[layer.layer] == planned[layer.layer] == size


@pytest.mark.parametrize("bits", CACHE_BITS)
def test_a_kv_size_is_met_in_bytes_and_said_everywhere(
    bits: str, llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    report = convert(llama, tmp_path / "out", kv_size="30%", rank_multiple=2, cache_bits=bits)
    chosen = {layer.bits or "16 + 16" for layer in report.layers}
    assert chosen <= {f"{latent} + {rope}" for latent, rope in CACHE_BITS[bits]}
    # all that a layer of this source has takes less than 20 % in 2 bits
    assert (0.15 if bits == "2" else 0.2) < report.kv_share <= 0.3
    assert sum(cached_bytes(tmp_path / "out")) == report.kv_bytes_after
    facts = inspect_checkpoint(tmp_path / "out")
    assert (facts["kv_bytes_before"], facts["kv_bytes_after"]) == (report.kv_bytes_before, report.kv_bytes_after)
    assert f"| {report.kv_bytes_after} " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    entries = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["mla_layers"]
    assert all(("latent_bits" in entry) == (bits != "16") for entry in entries if bits != "auto")


@pytest.mark.parametrize(("bits", "least"), [("16", 3 * 4 * 4), ("8", 3 * 8), ("4", 3 * 6), ("auto", 3 * 6)])
def test_the_smallest_size_that_a_sentence_names_can_be_had(
    bits: str, least: int, llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    """In steps of 2: 2 + 2 numbers in each of three layers, and the scales of their codes."""
    options = {"rank_multiple": 2, "cache_bits": bits}
    with pytest.raises(OptionError, match=rf"expected at least .*\({least} bytes per token\).*\({least - 1} bytes\)"):
        convert(llama, tmp_path / "out", kv_bytes_per_token=least - 1, **options)
    report = convert(llama, tmp_path / "out", kv_bytes_per_token=least, **options)
    assert report.kv_bytes_after == least


def test_a_rotary_width_is_refused_before_anything_is_measured(llama: Path) -> None:
    """Not after the source was gone through for the ranks of --energy."""
    with pytest.raises(OptionError, match="6 bits takes a multiple of 8"):
        make_plan(CheckpointIndex.open(llama), ConvertOptions(energy=0.9, rope_dim=4, cache_bits="3"))


@pytest.mark.parametrize("multiple", [2, 6, 12])
def test_ranks_in_bit_planes_keep_to_a_given_multiple(
    multiple: int, llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"kv_size": "60%", "rank_multiple": multiple, "cache_bits": "3"}
    if multiple > 2:  # whose next multiple in whole bytes is beyond what the source caches
        with pytest.raises(OptionError, match="rank-multiple"):
            convert(llama, tmp_path / "out", **options)
        return
    report = convert(llama, tmp_path / "out", **options)
    assert all(layer.kv_lora_rank % 16 == 0 and layer.qk_rope_head_dim % 8 == 0 for layer in report.layers)


def test_fewer_bits_leave_more_numbers_and_a_smaller_loss(
    llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    reports = {
        bits: convert(llama, tmp_path / bits, kv_size="30%", rank_multiple=2, cache_bits=bits) for bits in ("16", "4")
    }
    numbers = {bits: sum(layer.kv_numbers_after for layer in report.layers) for bits, report in reports.items()}
    assert numbers["4"] > 2 * numbers["16"]
    assert reports["4"].summary["fidelity"]["kl"] < 0.7 * reports["16"].summary["fidelity"]["kl"]


@pytest.mark.parametrize("init", ["paper", "calibrated"])
@pytest.mark.parametrize("norm", [False, True])
def test_every_initialisation_turns_its_latents(
    init: str, norm: bool, llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    """At 8 bits the result is that of 16 bits up to their rounding."""
    options: dict[str, Any] = {"rank": 12, "rope_dim": 4, "init": init, "latent_norm": norm}
    if init == "paper":
        make: Callable[..., Any] = xeco_convert.convert
    else:
        make = convert
    logits = []
    for bits in ("16", "8"):
        make(llama, tmp_path / bits, cache_bits=bits, **options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / bits).eval()
        logits.append(model(random_ids(2, 20)).logits.detach())
    assert 0 < float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.05


@pytest.mark.slow
def test_refinement_lowers_what_a_layer_in_codes_loses(stories: Path, shared: Path, tmp_path: Path) -> None:
    text = str(shared / "text" / "stories260k_samples.json")
    options: dict[str, Any] = {
        "rank": 16,
        "rope_dim": 8,
        "cache_bits": "4",
        "calibration": text,
        "calibration_tokens": 2048,
        "layers": "1,3",
    }
    plain = xeco_convert.convert(stories, tmp_path / "plain", **options)
    refined = xeco_convert.convert(stories, tmp_path / "refined", refine=True, refine_steps=8, **options)
    assert refined.summary["fidelity"]["kl"] < 0.85 * plain.summary["fidelity"]["kl"]  # 0.75 observed
    assert [layer.latent_bits for layer in refined.layers] == [None, 4, None, 4, None]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such bits": ({"rank": 8, "cache_bits": "5"}, r"--cache-bits: expected one of 16, 8, 4, 3, 2, auto, found 5"),
    "bits to choose without a size": ({"rank": 8, "cache_bits": "auto"}, r"--cache-bits auto: .*give --kv-size"),
    "an odd rank": (
        {"rank": 7, "cache_bits": "4"},
        r"--cache-bits: .* 4 bits takes a multiple of 2 .* kv_lora_rank = 7",
    ),
    "a rank that is no whole byte": (
        {"rank": 12, "cache_bits": "3"},
        r"3 bits takes a multiple of 8 .*kv_lora_rank = 12",
    ),
    "a rotary key that is none": (
        {"rank": 16, "rope_dim": 4, "cache_bits": "3"},
        r"6 bits takes a multiple of 8 .*qk_rope_head_dim = 4; choose another --rank or --rope-dim",
    ),
    "a rotary key that is none, before ranks are looked for": (
        {"energy": 0.9, "rope_dim": 4, "cache_bits": "3"},
        r"6 bits takes a multiple of 8 .*qk_rope_head_dim = 4; choose another --rank or --rope-dim",
    ),
    "an odd rank beside others that are chosen": (
        {"energy": 0.9, "fixed_ends": True, "rank": 7, "cache_bits": "4", "init": "paper"},
        r"--cache-bits: a row in 4 bits takes a multiple of 2 numbers, found kv_lora_rank = 7",
    ),
    "a stock model": (
        {"rank": 8, "portable": True, "cache_bits": "8"},
        r"--cache-bits 8: a stock DeepSeek model .*leave it out with --portable",
    ),
    "a size below one step": (
        {"kv_size": "2%", "cache_bits": "4"},
        r"--kv-size: expected at least .*bytes per token.*--rank-multiple, or cache fewer bits \(--cache-bits\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence(case: str, llama: Path, tmp_path: Path) -> None:
    options, sentence = REFUSED[case]
    with pytest.raises(OptionError, match=sentence):
        xeco_convert.convert(llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_engines_whose_pages_hold_numbers_refuse_codes(
    llama: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    convert(llama, tmp_path / "out", rank=8, rope_dim=4, cache_bits="8")
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1, 2\] cache latents in codes \(--cache-bits\)"):
        export_checkpoint(tmp_path / "out", tmp_path / "stock", ExportOptions(target="llama.cpp"))
    entry = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["mla_layers"][0]
    settings = ServingSettings(device="cpu", max_model_len=64)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0: latents and rotary keys in 8 \+ 8 bits .*transformers alone"
    ):
        check_layer(0, MlaLayer.from_dict(entry), None, settings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latent_bits": 7}, "no such value can be, found latent_bits = 7"),
        ({"latent_bits": [8, 16]}, r"no such value can be, found latent_bits = \[8, 16\]"),
        ({"latent_bits": [8] * 8}, r"no such value can be, found latent_bits = \[8, "),
        ({"latent_bits": [16, 16]}, "first bit plane of a row reaches all its numbers, found 16 of kv_lora_rank = 8"),
        ({"rope_bits": 6}, "a row in 6 bits takes a multiple of 8 numbers, found qk_rope_head_dim = 4"),
        ({"rope_bits": True}, "no such value can be, found rope_bits = True"),
        (
            {"latent_bits": 4, "kv_lora_rank": 7},
            "a row in 4 bits takes a multiple of 2 numbers, found kv_lora_rank = 7",
        ),
    ],
)
def test_odd_entries_of_config_json_are_refused(change: dict[str, Any], sentence: str) -> None:
    entry = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    assert MlaLayer.from_dict(entry).cache_bytes(2) == 24
    with pytest.raises(ValueError, match=sentence):
        MlaLayer.from_dict({**entry, **change})


def test_the_command_plans_in_bytes(llama: Path, tmp_path: Path) -> None:
    plan = run_command("xeco-convert", llama, "--dry-run", "--rank", 8, "--rope-dim", 4, "--cache-bits", 4)
    assert "KV cache: 384 -> 36 bytes per token (9.4%), latents in 4 bits, rotary keys in 8" in plan.stdout, plan.stderr
    assert ConvertOptions(rank=8, cache_bits="4").cache_bits_on_offer == ((4, 8),)
    assert ConvertOptions(kv_size="20%", cache_bits="4").cache_bits_on_offer == ((4, 8), (4, 4))


@pytest.mark.parametrize(
    ("device_type", "requested", "expected"),
    [
        ("cpu", None, True),
        ("cpu", "fused", True),
        ("cuda", None, False),
        ("cuda", "fused", True),
        ("xpu", "fused", False),
    ],
)
def test_a_gpu_reads_codes_where_that_is_asked_for(device_type: str, requested: str | None, expected: bool) -> None:
    """No GPU has run the present form of these kernels."""
    assert takes_codes(device_type, requested) is expected

"""Converted models as stock DeepSeek-V3: transformers' own class gives our logits and text; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, build_checkpoint, random_ids
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.cli import main
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError, VerificationError
from xeco_convert.export import ExportOptions, export_checkpoint
from xeco_convert.export.engines import ENGINES
from xeco_convert.export.formats.deepseek_v3 import tensors

# The conversions that tests share draw their pages.
pytestmark = pytest.mark.usefixtures("without_plots")

# (variant, rotary type, options): what stock classes can hold
PORTABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "default", {"rank": 12, "rope_dim": 8}),
    "llama_few_frequencies": ("llama_wide_heads", "default", {"rank": 12, "rope_dim": 6}),
    "llama_llama3": ("llama", "llama3", {"rank": 12, "rope_dim": 4}),
    "llama_linear": ("llama_mqa", "linear", {"rank": 8, "rope_dim": 4}),
    "llama_yarn_whole": ("llama_tied", "yarn", {"rank": 12, "rope_dim": 8}),
    "llama_low_rank_queries": ("llama", "default", {"rank": 12, "rope_dim": 8, "q_rank": 20}),
    "llama_budget": ("llama", "default", {"kv_size": "50%"}),
    "mistral": ("mistral", "default", {"rank": 12, "rope_dim": 4}),
    "phi3_partial": ("phi3_partial", "default", {"rank": 12, "rope_dim": 6, "no_window": True}),
    "granite": ("granite", "default", {"rank": 12, "rope_dim": 8, "no_bias": True}),
    "smollm3": ("smollm3", "default", {"rank": 12, "rope_dim": 8}),
}


def convert(base: Path, variant: str, rope: str = "default", **options: Any) -> Path:
    changes: dict[str, Any] = {}
    if options.pop("no_bias", False):
        changes["attention_bias"] = False
    if options.pop("no_window", False):
        changes["sliding_window"] = None
    if "num_layers" in options:
        changes["num_hidden_layers"] = options.pop("num_layers")
    source = build_checkpoint(base / "source", variant, rope, tokenizer=True, **changes)
    words = torch.randint(3, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(5))
    (base / "words.txt").write_text(" ".join(f"w{number}" for number in words.tolist()))
    settings = {"portable": True, "calibration": str(base / "words.txt"), "calibration_tokens": 1024, **options}
    if settings.get("init") == "paper":
        settings = {key: value for key, value in settings.items() if not key.startswith("calibration")}
    xeco_convert.convert(source, base / "converted", **settings)
    return base / "converted"


@pytest.fixture(scope="module")
def llama_portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("portable"), "llama", rank=12, rope_dim=8)


@pytest.fixture(scope="module")
def bfloat16_portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("bfloat16"), "llama", rank=12, rope_dim=8, dtype="bfloat16")


@pytest.fixture(scope="module")
def llama3_portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("llama3"), "llama", "llama3", rank=8, rope_dim=8)


@pytest.mark.parametrize("case", PORTABLE)
def test_the_stock_class_gives_our_logits_and_text(case: str, tmp_path: Path) -> None:
    variant, rope, options = PORTABLE[case]
    num_layers = 3 if variant == "smollm3" else 2  # whose second of three layers is without rotation
    converted = convert(tmp_path, variant, rope, num_layers=num_layers, **options)
    report = export_checkpoint(converted, tmp_path / "stock")
    assert report.comparison.logits_difference < 2e-5 * 10  # 5e-6 to 4e-5 observed
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens
    assert report.comparison.cache_numbers == report.kv_lora_rank + report.qk_rope_head_dim
    assert report.norm_kl is None
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    assert type(stock).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    ids = random_ids(2, 30)
    with torch.no_grad():
        # 1.3e-4 observed, where YaRN scales queries and keys
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=1e-4, atol=4e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "stock")("w5 w9")["input_ids"] == [5, 9]


@pytest.mark.parametrize(
    ("target", "widths"),
    [
        ("transformers", (12, 8, 8, 8)),
        ("vllm", (256, 64, 64, 128)),
        ("vllm-cpu", (512, 64, 64, 128)),
        ("sglang", (256, 64, 64, 128)),
        ("llama.cpp", (12, 8, 8, 8)),
        ("mlx", (12, 8, 8, 8)),
    ],
)
def test_targets_get_widths_that_they_take(
    target: str, widths: tuple[int, int, int, int], llama_portable: Path, tmp_path: Path
) -> None:
    report = export_checkpoint(llama_portable, tmp_path / "stock", ExportOptions(target=target))
    found = (report.kv_lora_rank, report.qk_nope_head_dim, report.qk_rope_head_dim, report.v_head_dim)
    assert found == widths
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default" and config["rope_interleave"] is True
    assert config["q_lora_rank"] == (0 if target == "llama.cpp" else None)
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]
    with safe_open(tmp_path / "stock" / "model.safetensors", framework="pt") as file:
        assert not any(name.endswith("bias") for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(("target", "said"), [("vllm-cpu", True), ("transformers", False)])
def test_padding_is_told_with_the_way_to_do_without(
    target: str, said: bool, llama_portable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", str(llama_portable), str(tmp_path / "stock"), "--target", target])
    assert end.value.code in (0, None)
    told = f"padding: {(512 + 64) / (12 + 8):.1f} times the cache of the converted folder; vLLM with xeco-convert installed"
    assert (told in capsys.readouterr().out) is said


def test_a_norm_is_put_in_place_and_its_price_told(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", rank=12, rope_dim=8, portable=False, init="paper")
    report = export_checkpoint(converted, tmp_path / "stock")
    assert report.norm_kl is not None and 0 < report.norm_kl < 1
    assert report.norm_top1 is not None and report.norm_top1 > 0.5
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens


def test_half_precision_is_kept_and_compared(bfloat16_portable: Path, tmp_path: Path) -> None:
    report = export_checkpoint(bfloat16_portable, tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.comparison.logits_difference < 0.25


@pytest.mark.parametrize("target", ENGINES.names())
def test_latent_rows_are_stored_with_the_bits_that_they_had(
    target: str, bfloat16_portable: Path, tmp_path: Path
) -> None:
    """Scaled by a power of two, at which the norm's eps acts as in our model within a factor of two."""
    report = export_checkpoint(bfloat16_portable, tmp_path / "stock", ExportOptions(target=target))
    ours, stock = (load_file(folder / "model.safetensors") for folder in (bfloat16_portable, tmp_path / "stock"))
    eps = [1e-5, ENGINES.find(target, "--target").norm_eps or 1e-5]  # of config.json, and what the target's norm has
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"
        before, after = ours[name][:12].float(), stock[name][:12].float()
        assert torch.equal(after.frexp().mantissa, before.frexp().mantissa)
        scale = float(after.norm() / before.norm())
        wanted = (eps[1] / eps[0] * report.kv_lora_rank / 12) ** 0.5
        assert 0.5**0.5 <= scale / wanted <= 2**0.5


def test_widths_that_differ_between_layers_are_padded(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", energy=0.95, rope_dim=4)
    ranks = [layer["kv_lora_rank"] for layer in json.loads((converted / "config.json").read_text())["mla_layers"]]
    report = export_checkpoint(converted, tmp_path / "stock")
    assert report.kv_lora_rank == max(ranks)
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens


REFUSED_PORTABLE = [
    ("qwen2", {}, r"its attention has biases \(q, kv_a\), which the engines drop or reject"),
    ("qwen3", {}, "its queries and keys are normalised"),
    ("gemma2", {}, "its scores are soft-capped"),
    ("mixtral", {}, "its router is a softmax"),
    ("gpt_neox", {}, "LayerNorm"),
    ("mistral_window", {}, "it attends through a window of 7 tokens"),
    ("llama", {"layers": "0-1"}, "some of its layers are to keep their attention"),
]


@pytest.mark.parametrize(("variant", "options", "sentence"), REFUSED_PORTABLE)
def test_what_cannot_be_portable_is_refused_before_anything_is_computed(
    variant: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    source = build_checkpoint(tmp_path / "source", variant)
    with pytest.raises(OptionError, match=f"--portable: .* cannot become DeepSeek-V3: .*{sentence}"):
        xeco_convert.convert(source, tmp_path / "out", portable=True, rank=8, **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_sent_to_what_takes_the_converted_folder(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", "qwen2", tokenizer=True)
    xeco_convert.convert(source, tmp_path / "out", init="paper", rank=8)
    with pytest.raises(
        UnsupportedModelError,
        match=r"Serve the converted folder itself with transformers, or with vLLM where xeco-convert is installed beside it",
    ):
        export_checkpoint(tmp_path / "out", tmp_path / "stock")


def test_repeated_frequencies_are_refused_with_the_way_out(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", rank=8, rope_dim=16, portable=False)  # 8 pairs, 4 frequencies
    with pytest.raises(UnsupportedModelError, match=r"several pairs at one frequency .*convert with --portable"):
        export_checkpoint(converted, tmp_path / "stock")


@pytest.mark.parametrize("target", ["vllm", "vllm-cpu", "sglang", "llama.cpp"])
def test_rotary_scalings_that_an_engine_misreads_are_refused(
    target: str, llama3_portable: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"--target {target}: rotary type 'llama3' would not come out"):
        export_checkpoint(llama3_portable, tmp_path / "stock", ExportOptions(target=target))


def test_scalings_of_all_frequencies_together_need_all_of_them(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", "yarn", rank=8, rope_dim=4)
    with pytest.raises(UnsupportedModelError, match="'yarn' scales all frequencies of a head together"):
        export_checkpoint(converted, tmp_path / "stock")


def test_models_too_wide_for_an_engine_are_refused(tmp_path: Path, llama_portable: Path) -> None:
    config = json.loads((llama_portable / "config.json").read_text())
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in llama_portable.iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    for layer in config["mla_layers"]:
        layer["kv_lora_rank"] = 600
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="latents of up to 512 numbers, and this model has 600"):
        export_checkpoint(wide, tmp_path / "stock", ExportOptions(target="vllm"))


def test_hybrids_and_sources_are_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(
        CheckpointError, match="expected a checkpoint converted by xeco-convert, found model_type 'llama'"
    ):
        export_checkpoint(llama, tmp_path / "stock")
    hybrid = convert(tmp_path, "llama", rank=8, rope_dim=8, portable=False, layers="0,2", init="paper")
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\] kept the source's attention"):
        export_checkpoint(hybrid, tmp_path / "stock")


@pytest.mark.parametrize("fields", [{"format": "gguf"}, {"target": "tgi"}, {"max_shard_size": "many"}])
def test_unknown_formats_and_targets_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="expected"):
        ExportOptions(**fields)


def test_a_mismatch_is_an_error_and_leaves_nothing(
    llama_portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tensors.stock_tensors

    def damaged(*arguments: Any) -> Any:
        for name, tensor in original(*arguments):
            yield name, tensor.flip(0) if name.endswith("1.self_attn.kv_a_proj_with_mqa.weight") else tensor

    monkeypatch.setattr(tensors, "stock_tensors", damaged)
    with pytest.raises(VerificationError, match=r"differs from the converted model: logits by .* nothing was written"):
        export_checkpoint(llama_portable, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_request(llama_portable: Path, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "mine.txt").write_text("kept")
    with pytest.raises(OptionError, match="--overwrite"):
        export_checkpoint(llama_portable, tmp_path / "stock")
    assert (tmp_path / "stock" / "mine.txt").read_text() == "kept"
    with pytest.raises(OptionError, match="what is written must lie outside what is read"):
        export_checkpoint(llama_portable, llama_portable / "stock")
    export_checkpoint(llama_portable, tmp_path / "stock", ExportOptions(overwrite=True))
    assert not (tmp_path / "stock" / "mine.txt").exists()

"""xeco_convert.convert with every option, on tiny checkpoints of each family; what it writes loads and is complete."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROPES, VARIANTS, build_checkpoint, random_ids
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import xeco_convert
from xeco_convert.errors import OptionError, VerificationError

# `paper` takes keys that are linear in their weights; tests/families converts every family with the default initialisation
PLAIN = [variant for variant in VARIANTS if variant.split("_")[0] in ("llama", "mistral", "qwen2")]
CASES = [(variant, "default") for variant in PLAIN] + [("qwen2_window", rope) for rope in ROPES if rope != "default"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("variant", "rope"), CASES)
@pytest.mark.parametrize("old_style", [False, True])
def test_every_family_and_rotary_type_converts_verifies_and_loads(
    variant: str, rope: str, old_style: bool, tmp_path: Path
) -> None:
    source = build_checkpoint(tmp_path / "in", variant, rope, old_style=old_style)
    report = xeco_convert.convert(source, tmp_path / "out", init="paper", rank=8, rope_dim=4, verify=True)
    assert all(layer.exactness_error < 1e-5 for layer in report.layers)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert bool(model.eval()(random_ids(1, 20)).logits.isfinite().all())
    kept = AutoConfig.from_pretrained(source)
    assert model.config.rope_parameters == kept.rope_parameters
    assert getattr(model.config, "sliding_window", None) == getattr(kept, "sliding_window", None)
    assert getattr(model.config, "layer_types", None) == getattr(kept, "layer_types", None)


def test_tensors_outside_the_attention_keep_their_bytes(llama: Path, converted: Path) -> None:
    before, after = weights(llama), weights(converted)
    kept = {name for name in before if ".self_attn." not in name}
    assert kept == {name for name in after if ".self_attn." not in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not any(".k_proj." in name or ".v_proj." in name for name in after)


def test_chosen_layers_are_converted_and_the_others_keep_their_bytes(llama: Path, tmp_path: Path) -> None:
    report = xeco_convert.convert(llama, tmp_path / "out", init="paper", rank=12, layers="0,2")
    before, after = weights(llama), weights(tmp_path / "out")
    kept = {name for name in before if ".layers.1." in name}
    assert len(kept) == 9 and all(torch.equal(before[name], after[name]) for name in kept)
    assert [layer.kv_lora_rank for layer in report.layers] == [12, None, 12]
    assert [layer.kv_numbers_after for layer in report.layers] == [16, 32, 16]
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["mla_layers"]
    assert [entry is None for entry in entries] == [False, True, False]


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(
    source_dtype: torch.dtype, dtype: str | None, tmp_path: Path
) -> None:
    source = build_checkpoint(tmp_path / "in", "qwen2", dtype=source_dtype, num_shards=2, old_style=True)
    report = xeco_convert.convert(source, tmp_path / "out", init="paper", rank=12, dtype=dtype)
    expected = source_dtype if dtype is None else getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {expected}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == expected
    assert report.kv_bytes_per_number == expected.itemsize


def test_a_source_of_several_dtypes_keeps_them(tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 matrices, as some checkpoints have them; both load."""
    source = build_checkpoint(tmp_path / "in", "llama", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    xeco_convert.convert(source, tmp_path / "out", init="paper", rank=11)
    found = weights(tmp_path / "out")
    assert {tensor.dtype for name, tensor in found.items() if "norm" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in found.items() if "norm" not in name} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"rank": 1, "rope_dim": 2}, {"kv_lora_rank": 1, "qk_rope_head_dim": 2, "qk_nope_head_dim": 6}),
        ({"rank": 32, "rope_dim": 8}, {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 0}),
        ({"rank": 12}, {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "q_lora_rank": None, "latent_norm": False}),
        ({"rank": 12, "nope_dim": 0}, {"qk_nope_head_dim": 0, "qk_rope_head_dim": 4}),
        ({"rank": 12, "nope_dim": 8}, {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}),
        ({"rank": 12, "q_rank": 32}, {"q_lora_rank": 32}),
        ({"rank": 12, "q_rank": 1}, {"q_lora_rank": 1}),
        ({"rank": 12, "latent_norm": True}, {"latent_norm": True}),
        ({"energy": 1.0}, {"kv_lora_rank": 32}),
    ],
)
def test_widths_follow_the_options(
    llama: Path, tmp_path: Path, options: dict[str, Any], widths: dict[str, Any]
) -> None:
    xeco_convert.convert(llama, tmp_path / "out", init="paper", **options)
    for entry in json.loads((tmp_path / "out" / "config.json").read_text())["mla_layers"]:
        assert {name: entry[name] for name in widths} == widths
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert bool(model(random_ids(1, 9)).logits.isfinite().all())
        model.generate(random_ids(1, 3), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_stale_rotary_buffers_are_left_out_and_named(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "in", "llama_tied")
    tensors = load_file(source / "model.safetensors")
    stale = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **stale}, source / "model.safetensors")
    report = xeco_convert.convert(source, tmp_path / "out", init="paper", rank=12)
    assert set(report.dropped) == set(stale)
    assert not set(stale) & set(weights(tmp_path / "out"))
    assert report.parameters_before == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("ranks", [{"rank": 12}, {"energy": 0.9}, {"rank": 12, "layers": "1"}])
def test_progress_goes_from_nothing_to_the_whole(llama: Path, tmp_path: Path, ranks: dict[str, Any]) -> None:
    calls: list[tuple[str, float]] = []
    xeco_convert.convert(
        llama, tmp_path / "out", init="paper", **ranks, on_progress=lambda what, share: calls.append((what, share))
    )
    shares = [share for _, share in calls]
    assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == 1
    assert len(set(shares)) > 5 and all(what for what, _ in calls)


def test_options_are_given_once(llama: Path, tmp_path: Path) -> None:
    options = xeco_convert.ConvertOptions(rank=12)
    with pytest.raises(OptionError, match="not both"):
        xeco_convert.convert(llama, tmp_path / "out", options, rank=12)
    with pytest.raises(TypeError):
        xeco_convert.convert(llama, tmp_path / "out", ranks=12)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_understood_fails_verification_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a class of transformers whose attention had changed would."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    original = LlamaAttention.__init__

    def changed(self: Any, config: Any, layer_idx: int) -> None:
        original(self, config, layer_idx)
        if not getattr(config, "mla_layers", None) and type(self) is LlamaAttention:
            self.scaling *= 1.01 if self.q_proj.weight.device.type != "meta" else 1

    monkeypatch.setattr(LlamaAttention, "__init__", changed)
    with pytest.raises(VerificationError, match=r"layer 0: .* differs from it by .*, expected at most 1e-04"):
        xeco_convert.convert(llama, tmp_path / "out", init="paper", rank=12, verify=True)
    assert list(tmp_path.iterdir()) == []

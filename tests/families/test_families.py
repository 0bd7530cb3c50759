"""Family files: strict about their keys, and true to the classes of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROPES, VARIANTS, build_checkpoint, source_config, stored_tensors
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError
from xeco_convert.families import FamilySpec, family_for, registry, supported_model_types
from xeco_convert.families.__main__ import table
from xeco_convert.modeling.configuration_xeco import source_class
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan

FILES = sorted(Path(registry.__file__).parent.glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_family_file_is_named_after_its_model_type_and_classes(file: Path) -> None:
    spec = FamilySpec.from_toml(file)
    assert spec.model_type == file.stem
    assert type(AutoConfig.for_model(spec.model_type)) is source_class(spec.class_prefix, "Config")
    assert source_class(spec.class_prefix, "ForCausalLM").__name__ == f"{spec.class_prefix}ForCausalLM"
    assert not spec.input_norm or spec.input_norm in spec.tensors
    for name in spec.attention.values():
        assert f"{name}.weight" in spec.tensors
    for field in ("embedding", "output_head"):
        assert getattr(spec, field) in spec.tensors
    assert f"{spec.final_norm}weight" in spec.tensors


def test_the_issue_s_families_are_supported() -> None:
    named = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3_text", "phi3", "granite"}
    assert named | {"smollm3", "mixtral", "gpt_neox"} == set(supported_model_types())
    assert list(supported_model_types()) == sorted(supported_model_types())


def test_the_readme_s_table_is_made_from_the_family_files() -> None:
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert table() in readme.read_text(encoding="utf-8"), "put in what `python -m xeco_convert.families` prints"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "change", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_hidden_layers": 11}]
)
def test_expected_tensors_are_those_of_the_transformers_class(variant: str, change: dict[str, Any]) -> None:
    if "num_hidden_layers" in change:  # lists of layers grow with it
        change = {**change, "layer_types": None, "no_rope_layers": None}
    config = source_config(variant, **change)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    state = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model, torch.float32).items()}
    assert family_for(config).expected_tensors(config) == state


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("left_out", ["head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_defaults_are_those_of_the_transformers_class(variant: str, left_out: str) -> None:
    config = source_config(variant)
    config.pop(left_out, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert family_for(config).expected_tensors(config) == state


@pytest.mark.parametrize("variant", VARIANTS)
def test_geometry_is_that_of_the_transformers_class(variant: str) -> None:
    config = source_config(variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    spec = family_for(config)
    attention = getattr(model.base_model.layers[0], spec.module)
    geometry = spec.geometry(config)
    assert geometry.head_dim == getattr(attention, "head_dim", None) or attention.head_size
    if hasattr(attention, "k_proj"):
        assert geometry.cache_width == attention.k_proj.out_features + attention.v_proj.out_features
        assert geometry.num_attention_heads * geometry.head_dim == attention.q_proj.out_features


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("old_style", [False, True])
def test_rotary_types_are_accepted_in_both_styles(variant: str, rope: str, old_style: bool) -> None:
    config = source_config(variant, rope, old_style=old_style)
    family_for(config).check_config(config)


REFUSED = {
    "unknown rotary type": ({"rope_parameters": {"rope_type": "longrope"}}, "rotary type 'longrope' is not supported"),
    "unknown old rotary type": ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rotary type 'su'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial rotary settings": ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), expected float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_a_family_does_not_describe_are_refused(case: str) -> None:
    change, sentence = REFUSED[case]
    config = {**source_config("llama"), **change}
    with pytest.raises(UnsupportedModelError, match=sentence):
        family_for(config).check_config(config)


UNKNOWN_FIELDS = {
    "llama": [{"attn_logit_softcapping": 30.0}, {"qk_norm": True}, {"attention_multiplier": 0.1}, {"kv_lora_rank": 64}],
    "mistral": [{"attention_sinks": 4}, {"use_alibi": True}, {"rotary_pct": 0.5}],
    "qwen3": [{"query_pre_attn_scalar": 256}, {"no_rope_layers": [1, 0, 1]}, {"clip_qkv": 8.0}],
    "granite": [{"position_embedding_type": "nope"}],
}


@pytest.mark.parametrize("variant", UNKNOWN_FIELDS)
def test_unknown_fields_that_speak_of_attention_are_refused(variant: str) -> None:
    for change in UNKNOWN_FIELDS[variant]:
        config = {**source_config(variant), **change}
        with pytest.raises(UnsupportedModelError, match=f"{next(iter(change))} = .* is no field of a {variant} model"):
            family_for(config).check_config(config)
        silent = {**source_config(variant), **dict.fromkeys(change)}  # null: not in use
        family_for(silent).check_config(silent)


def test_a_wrapper_of_several_modalities_names_its_text_model() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(
        UnsupportedModelError, match=r"'gemma3' wraps a text model \('gemma3_text', which is a supported"
    ):
        family_for(config)
    with pytest.raises(UnsupportedModelError, match=r"\('opt', which is no supported family either\)"):
        family_for({"model_type": "blip-2", "text_config": {"model_type": "opt"}})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' is no decoder of text alone"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder"),
    ],
)
def test_encoders_are_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{sentence}; expected a decoder-only language model"):
        family_for(config)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_quantised_sources_are_to_be_dequantised_first(method: str) -> None:
    config = {**source_config("qwen3"), "quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({method}\), .*save a dequantised copy first"):
        family_for(config).check_config(config)


@pytest.mark.parametrize("variant", ["qwen3", "gemma3", "smollm3", "phi3_partial", "gpt_neox"])
def test_the_published_initialisation_is_refused_where_it_does_not_apply(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    with pytest.raises(OptionError, match=r"--init paper: not for .*; use --init calibrated"):
        make_plan(CheckpointIndex.open(folder), ConvertOptions(rank=8, init="paper"))


def test_layers_with_a_window_stay_unless_they_are_named(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", "gemma2")
    index = CheckpointIndex.open(folder)
    plan = make_plan(index, ConvertOptions(kv_size="50%"))
    assert plan.converted_layers == (1,) and plan.kept_windows == (0, 2)
    assert plan.source_kv_numbers_per_token() == [0, 48, 0] and plan.kv_budget == 24
    named = make_plan(index, ConvertOptions(kv_size="50%", layers="0-2"))
    assert named.converted_layers == (0, 1, 2) and named.kept_windows == () and named.kv_budget == 72


@pytest.mark.parametrize("model_type", ["gemma", "gpt2", "Llama", "phi", "../llama"])
def test_other_families_are_named_with_the_supported_ones(model_type: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"'{model_type}' is not a supported family; supported are .*llama.*qwen2"
    ):
        family_for({"model_type": model_type})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ""}, {"model_type": 3}])
def test_a_configuration_without_a_model_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"expected a model_type, found .*; supported are .*llama"):
        family_for(config)


def test_a_converted_model_is_not_converted_again() -> None:
    with pytest.raises(UnsupportedModelError, match="already converted"):
        family_for({"model_type": "xeco_llama"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, found 4 and 3"),
        ({"head_dim": 7}, "even head_dim, found 7"),
        (
            {"head_dim": None, "hidden_size": 30},
            "expected a whole number for hidden_size / num_attention_heads, found 30 / 4",
        ),
        ({"num_attention_heads": 0}, "positive whole number for num_attention_heads, found 0"),
        ({"num_attention_heads": "4"}, "positive whole number for num_attention_heads, found '4'"),
        ({"hidden_size": None}, "positive whole number for hidden_size, found None"),
        ({"num_hidden_layers": True}, "positive whole number for num_hidden_layers, found True"),
        ({"num_hidden_layers": -1}, "positive whole number for num_hidden_layers, found -1"),
        ({"hidden_size": 32.0}, "positive whole number for hidden_size, found 32.0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(change: dict[str, Any], sentence: str) -> None:
    config = {**source_config("llama"), **change}
    with pytest.raises(CheckpointError, match=sentence):
        family_for(config).geometry(config)


def changed_file(tmp_path: Path, old: str, new: str) -> Path:
    text = (FILES[0].parent / "llama.toml").read_text()
    assert old in text
    file = tmp_path / "llama.toml"
    file.write_text(text.replace(old, new, 1))
    return file


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('title = "', 'titel = "', r"unknown keys \['titel'\], missing \['title'\]"),
        ("[defaults]", "window = 3\n[defaults]", r"unknown keys \['window'\]"),
        ('k_proj = "', 'key_proj = "', r"\[attention\] must name q_proj, k_proj"),
    ],
)
def test_misspelt_keys_of_a_family_file_raise(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FamilySpec.from_toml(changed_file(tmp_path, old, new))


def test_old_rotary_buffers_are_ignored_by_name() -> None:
    spec = supported_model_types()["llama"]
    assert spec.is_ignored("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not spec.is_ignored("model.layers.x.self_attn.rotary_emb.inv_freq")
    assert not spec.is_ignored("model.layers.1.self_attn.rotary_emb.inv_freq2")
    assert not spec.is_ignored("model.layers.1.self_attn.q_proj.weight")

"""Family files: strict about their keys, and true to the classes of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROPES, VARIANTS, source_config
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.families import FamilySpec, family_for, registry, supported_model_types

FILES = sorted(Path(registry.__file__).parent.glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_family_file_is_named_after_its_model_type_and_classes(file: Path) -> None:
    spec = FamilySpec.from_toml(file)
    assert spec.model_type == file.stem
    assert AutoConfig.for_model(spec.model_type).__class__.__name__ == f"{spec.class_prefix}Config"
    assert spec.input_norm in spec.tensors
    for name in spec.attention.values():
        assert f"{name}.weight" in spec.tensors


def test_the_issue_s_families_are_supported() -> None:
    assert {"llama", "mistral", "qwen2"} <= set(supported_model_types())
    assert list(supported_model_types()) == sorted(supported_model_types())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "change", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_hidden_layers": 11}]
)
def test_expected_tensors_are_those_of_the_transformers_class(variant: str, change: dict[str, Any]) -> None:
    config = source_config(variant, **change)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
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
        attention = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.layers[0].self_attn
    geometry = family_for(config).geometry(config)
    assert geometry.head_dim == attention.head_dim
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


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "Llama", "phi3", "../llama"])
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

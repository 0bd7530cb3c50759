"""The configuration of converted models: honest, complete, and strict about what it reads."""

import inspect
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from xeco_convert.families import supported_model_types
from xeco_convert.modeling import MlaLayer, family_config_class, family_model_class
from xeco_convert.modeling.configuration_xeco import auto_map

ENTRY = {"kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY,
        {**ENTRY, "q_lora_rank": 20, "latent_norm": True, "biases": ["q", "kv_a"]},
        {**ENTRY, "rope_index": [0, 3]},
        {**ENTRY, "qk_nope_head_dim": 0},
    ],
)
def test_a_layer_survives_json(entry: dict[str, object]) -> None:
    layer = MlaLayer.from_dict(entry)
    again = json.loads(json.dumps(layer.to_dict()))
    assert MlaLayer.from_dict(again) == layer
    assert {name: again[name] for name in entry} == entry
    assert layer.cache_width == 16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_rank": 3}, r"unknown keys \['kv_rank'\]; this checkpoint needs a newer xeco-convert"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim even"),
        ({"qk_rope_head_dim": -2}, "qk_rope_head_dim even"),
        ({"kv_lora_rank": 0}, "widths must be positive"),
        ({"v_head_dim": 0}, "widths must be positive"),
        ({"rope_index": [0, 1, 2]}, "expected 2 rope_index entries, found 3"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MlaLayer.from_dict({**ENTRY, **change})


@pytest.mark.parametrize("entries", [None, [], [ENTRY], [ENTRY] * 4])
def test_a_model_needs_one_entry_for_each_layer(entries: list[dict[str, int]] | None) -> None:
    found = None if entries is None else len(entries)
    config = family_config_class("Llama")(num_hidden_layers=3, mla_layers=entries)
    with pytest.raises(ValueError, match=f"expected 3 entries in mla_layers, found {found}"):
        config.layer(0)


@pytest.mark.parametrize(
    ("prefix", "model_type"), [("Llama", "xeco_llama"), ("Mistral", "xeco_mistral"), ("Qwen2", "xeco_qwen2")]
)
def test_each_family_has_its_own_model_type_and_classes(prefix: str, model_type: str) -> None:
    config_class = family_config_class(prefix)
    assert config_class.model_type == model_type
    assert family_model_class(prefix, "ForCausalLM").config_class is config_class
    assert type(AutoConfig.for_model(model_type)) is config_class
    assert config_class().auto_map == auto_map(prefix)


@pytest.mark.parametrize("kind", ["ForCausalLM", "Model"])
@pytest.mark.parametrize("prefix", [spec.class_prefix for spec in supported_model_types().values()])
def test_no_annotation_of_an_initialiser_is_a_string(prefix: str, kind: str) -> None:
    """Tools check arguments against them with isinstance (vLLM's support_torch_compile, for one)."""
    signature = inspect.signature(family_model_class(prefix, kind).__init__)
    assert list(signature.parameters) == ["self", "config"]
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    assert not any(isinstance(annotation, str) for annotation in [*annotations, signature.return_annotation])


def test_a_converted_configuration_never_says_llama(converted: Path) -> None:
    written = json.loads((converted / "config.json").read_text())
    assert written["model_type"] == "xeco_llama"
    assert written["architectures"] == ["XecoLlamaForCausalLM"]


def test_the_settings_of_the_source_are_kept(llama: Path, converted: Path) -> None:
    source, config = AutoConfig.from_pretrained(llama).to_dict(), AutoConfig.from_pretrained(converted).to_dict()
    own = {"model_type", "architectures", "auto_map", "mla_layers", "conversion", "_name_or_path"}
    assert {key: value for key, value in config.items() if key not in own} == {
        key: value for key, value in source.items() if key not in own
    }


def test_the_configuration_class_is_that_of_the_source_extended(converted: Path) -> None:
    config = AutoConfig.from_pretrained(converted)
    assert isinstance(config, LlamaConfig)
    assert config.kv_cache_numbers_per_token() == [16, 16, 16]


def test_models_do_not_share_or_change_their_configuration(converted: Path) -> None:
    """Layers with a rotary module of their own need their own head_dim: the model's must stay as it is."""
    config = AutoConfig.from_pretrained(converted)
    before = config.to_dict()
    AutoModelForCausalLM.from_config(config)
    assert config.to_dict() == before
    assert config.head_dim == 8


def test_attention_is_left_out_of_the_tensor_parallel_plan() -> None:
    plan = family_config_class("Llama").base_model_tp_plan
    assert plan and not any("self_attn" in name for name in plan)


def test_names_that_are_no_family_are_not_found() -> None:
    import xeco_convert.modeling.configuration_xeco as configuration
    import xeco_convert.modeling.modeling_xeco as modeling

    for module in (configuration, modeling):
        with pytest.raises(AttributeError):
            _ = module.NoSuchThing

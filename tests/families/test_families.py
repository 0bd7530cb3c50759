"""Family files: strict about their keys, and true to the classes of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROPES, VARIANTS, build_checkpoint, source_config
from transformers import AutoConfig

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError
from xeco_convert.families import FamilySpec, family_for, registry, supported_model_types
from xeco_convert.families.__main__ import table
from xeco_convert.families.spec import refuse_quantised
from xeco_convert.modeling.configuration_xeco import source_class
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan
from xeco_convert.pretrained import read_config
from xeco_convert.source import open_source

FILES = sorted(Path(registry.__file__).parent.glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_family_file_is_named_after_its_model_type_and_classes(file: Path) -> None:
    spec = FamilySpec.from_toml(file)
    assert spec.model_type == file.stem
    assert type(AutoConfig.for_model(spec.model_type)) is source_class(spec.class_prefix, "Config")
    assert source_class(spec.class_prefix, "ForCausalLM").__name__ == f"{spec.class_prefix}ForCausalLM"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_of_a_family_file_are_those_of_the_class(variant: str, tmp_path: Path) -> None:
    source = open_source(CheckpointIndex.open(build_checkpoint(tmp_path / "source", variant)))
    spec, names = source.family, set(source.skeleton.state_dict())
    own = [f"{name}.weight" for name in spec.attention.values()] + ([spec.input_norm] if spec.input_norm else [])
    for name in (*own, spec.embedding, spec.output_head, f"{spec.final_norm}weight"):
        assert name.format(layer=0) in names


def test_the_families_that_readme_names_are_supported() -> None:
    named = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3_text", "phi3", "granite"}
    assert named | {"smollm3", "mixtral", "gpt_neox"} == set(supported_model_types())
    assert list(supported_model_types()) == sorted(supported_model_types())


def test_the_readme_s_table_is_made_from_the_family_files() -> None:
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert table() in readme.read_text(encoding="utf-8"), "put in what `python -m xeco_convert.families` prints"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("old_style", [False, True])
def test_geometry_is_that_of_the_transformers_class(variant: str, old_style: bool, tmp_path: Path) -> None:
    source = open_source(CheckpointIndex.open(build_checkpoint(tmp_path / "source", variant, old_style=old_style)))
    attention, geometry = getattr(source.decoder.layers[0], source.family.module), source.geometry
    assert geometry.head_dim == getattr(attention, "head_dim", None) or attention.head_size
    if not source.family.not_portable:  # the scale is asked for by export alone
        assert source.family.softmax_scale(source.values) == pytest.approx(attention.scaling)
    if hasattr(attention, "k_proj"):
        assert geometry.cache_width == attention.k_proj.out_features + attention.v_proj.out_features
        assert geometry.num_attention_heads * geometry.head_dim == attention.q_proj.out_features


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("old_style", [False, True])
def test_rotary_types_are_accepted_in_both_styles(variant: str, rope: str, old_style: bool) -> None:
    config = read_config(source_config(variant, rope, old_style=old_style))
    family_for({"model_type": config.model_type}).check_config(config.to_dict())
    assert config.rope_parameters["rope_type"] == rope


def test_rotary_types_that_a_family_does_not_describe_are_refused() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 16}
    values = {"rope_parameters": {"rope_type": "longrope", **factors}}
    with pytest.raises(UnsupportedModelError, match="rotary type 'longrope' is not supported for llama; supported are"):
        supported_model_types()["llama"].check_config(values)


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


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_attention_that_is_not_causal_is_refused(variant: str) -> None:
    values = read_config({**source_config(variant), "use_bidirectional_attention": True}).to_dict()
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention is set: an encoder of text"):
        family_for({"model_type": values["model_type"]}).check_config(values)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(12), torch.nn.RMSNorm(6)], ids=["LayerNorm", "half a head"])
def test_a_norm_of_keys_of_another_kind_is_refused_by_name(norm: torch.nn.Module, tmp_path: Path) -> None:
    source = open_source(CheckpointIndex.open(build_checkpoint(tmp_path / "source", "qwen3")))
    assert source.norm_of("k_norm") == source.norm_of("q_norm") == "head"
    source.skeleton.get_submodule("model.layers.0.self_attn").k_norm = norm
    sentence = rf"self_attn.k_norm: expected an RMSNorm over a head of 12 rows.*found {type(norm).__name__} over"
    with pytest.raises(UnsupportedModelError, match=sentence):
        source.norm_of("k_norm")


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_quantised_sources_are_to_be_dequantised_first(method: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({method}\), .*save a dequantised copy first"):
        refuse_quantised({"quantization_config": {"quant_method": method}})


@pytest.mark.parametrize("variant", ["qwen3", "gemma3", "smollm3", "phi3_partial", "gpt_neox"])
def test_the_published_initialisation_is_refused_where_it_does_not_apply(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    with pytest.raises(OptionError, match=r"--init paper: not for .*; use --init calibrated"):
        make_plan(CheckpointIndex.open(folder), ConvertOptions(rank=8, init="paper"))


def test_layers_with_a_window_stay_unless_they_are_named(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", "gemma2")
    index = CheckpointIndex.open(folder)
    plan = make_plan(index, ConvertOptions(kv_size="50%"))
    assert [item.layer for item in plan.converted] == [1] and [item.layer for item in plan.kept_windows] == [0, 2]
    assert plan.source_kv_numbers_per_token() == [0, 48, 0] and plan.kv_budget == 96
    named = make_plan(index, ConvertOptions(kv_size="50%", layers="0-2"))
    assert [item.layer for item in named.converted] == [0, 1, 2] and named.kept == () and named.kv_budget == 288


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
        ({"head_dim": None, "hidden_size": 30}, "even head_dim, found 7"),
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
        ("[attention]", "window = 3\n[attention]", r"unknown keys \['window'\]"),
        ('k_proj = "', 'key_proj = "', r"\[attention\] must name q_proj, k_proj"),
    ],
)
def test_misspelt_keys_of_a_family_file_raise(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FamilySpec.from_toml(changed_file(tmp_path, old, new))

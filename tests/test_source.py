"""A source is what transformers makes of its files: same settings, same parameters, whatever the files call their tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VARIANTS, build_checkpoint, source_model, write_json, write_tokenizer, write_weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert import convert
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.errors import CheckpointError, VerificationError, XecoWarning
from xeco_convert.pretrained import load_causal_lm
from xeco_convert.source import open_source

Tensors = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("without_plots")


def parameters(folder: Path) -> Tensors:
    """Every parameter as the conversion reads it."""
    source = open_source(CheckpointIndex.open(folder))
    reader = TensorReader(source.index)
    return {
        name: source.read_parameter(source.parameter_or_tied(name), lambda one: reader.read(one, dtype=torch.float32))
        for name in source.skeleton.state_dict()
    }


def assert_read_as_transformers_does(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = parameters(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["as published", "as saved now", "without the base model's prefix", "sharded"])
def test_every_parameter_is_what_transformers_loads(variant: str, form: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant, num_shards=3 if form == "sharded" else 1)
    file = folder / "model.safetensors"
    if form == "as saved now":  # experts in one tensor
        model = source_model(variant)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        write_weights(folder, tensors)
    elif form == "without the base model's prefix":
        write_weights(folder, without_prefix(load_file(file), source_model(variant).base_model_prefix))
    assert_read_as_transformers_does(folder)


def swapped(tensors: Tensors) -> Tensors:
    return {("lm_head.weight" if "embed" in name else name): tensor for name, tensor in tensors.items()}


def doubled(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def another(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, dims=0)}


@pytest.mark.parametrize("change", [swapped, doubled, another], ids=lambda change: change.__name__)
@pytest.mark.parametrize("variant", ["llama_tied", "qwen2_tied", "qwen3_bias", "gemma2", "phi3_partial"])
def test_tied_heads_are_those_that_transformers_loads(
    variant: str, change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    write_weights(folder, change(load_file(folder / "model.safetensors")))
    assert_read_as_transformers_does(folder)
    output = tmp_path / "converted"
    report = convert(folder, output, rank=16, layers="1", calibration=str(token_file(tmp_path)), calibration_tokens=64)
    assert report.dropped == ()
    source, converted = (load_causal_lm(one, torch.float32).get_output_embeddings() for one in (folder, output))
    assert torch.equal(source.weight, converted.weight)


def token_file(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    file = folder / "tokens.json"
    write_json(file, torch.randint(3, 90, (40, 32), generator=generator).tolist())
    write_tokenizer(folder / "source")
    return file


TABLES = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "gpt_neox"])
def test_tables_of_rotary_modules_are_left_out(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    source = open_source(CheckpointIndex.open(folder))
    layer, base = source.family.module_name(1), source.skeleton.base_model_prefix
    names = [f"{place}.rotary_emb.{table}" for place in (layer, base) for table in TABLES] + ["rotary_emb.inv_freq"]
    if variant == "gpt_neox":
        names += [f"{layer}.bias", f"{layer}.masked_bias"]
    write_weights(folder, {**load_file(folder / "model.safetensors"), **{name: torch.ones(4) for name in names}})
    found = open_source(CheckpointIndex.open(folder))
    assert sorted(found.names.ignored) == sorted(names)
    assert found.names.parameters.keys() == source.names.parameters.keys()
    assert_read_as_transformers_does(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.rotary_embedding.weight", "model.layers.7.mlp.up_proj.weight"]
)
def test_other_tensors_without_a_place_are_refused(name: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source")
    write_weights(folder, {**load_file(folder / "model.safetensors"), name: torch.ones(4)})
    with pytest.raises(CheckpointError, match=f"{name} is no tensor of a llama model with this config.json"):
        open_source(CheckpointIndex.open(folder))


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {**tensors, "norm.weight": tensors["model.norm.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"norm.weight are both model.norm.weight"):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral"])
def test_a_missing_expert_is_named_with_its_parameter(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if ".2.experts.1." in name or (".layers.2." in name and ".experts.1." in name))
    write_weights(folder, {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.experts.*some are\s+missing"):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_are_those_that_transformers_resolves(variant: str, old_style: bool, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant, old_style=old_style)
    expected = AutoConfig.from_pretrained(folder).to_dict()
    expected.pop("_name_or_path", None)
    assert open_source(CheckpointIndex.open(folder)).values == expected


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})


def test_of_two_rotary_settings_that_of_transformers_counts(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source")
    change_config(folder, rope_scaling={"rope_type": "linear", "factor": 4.0})
    found = open_source(CheckpointIndex.open(folder)).values["rope_parameters"]
    assert found == AutoConfig.from_pretrained(folder).rope_parameters and found["rope_type"] == "linear"


def test_a_silent_configuration_gets_the_defaults_of_the_class(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", "mistral")
    config = json.loads((folder / "config.json").read_text())
    config.pop("sliding_window")
    write_json(folder / "config.json", config)
    source = open_source(CheckpointIndex.open(folder))
    assert source.values["sliding_window"] == AutoConfig.from_pretrained(folder).sliding_window == 4096
    assert "window of 4096" in str(source.family.not_portable_because(source.values, ()))


@pytest.mark.parametrize("settings", [None, {}])
def test_an_empty_quantization_config_counts_as_none(settings: Any, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", tokenizer=True)
    change_config(folder, quantization_config=settings)
    convert(folder, tmp_path / "out", rank=16, calibration_tokens=64)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_causal_lm(tmp_path / "out", torch.float32)


def test_an_index_without_metadata_is_read(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", num_shards=2, tokenizer=True)
    file = folder / "model.safetensors.index.json"
    write_json(file, {"weight_map": json.loads(file.read_text())["weight_map"]})
    convert(folder, tmp_path / "out", rank=16, calibration_tokens=64)  # samples from the loaded source
    assert json.loads(file.read_text()).keys() == {"weight_map"}


@pytest.mark.parametrize("lone", [False, True])
def test_an_adapter_beside_the_weights_is_refused(lone: bool, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    if not lone:
        write_weights(tmp_path, {"x": torch.ones(1)})
        (tmp_path / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config.json, which transformers loads .* Merge it first"):
        CheckpointIndex.open(folder)


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "use_qk_norm", True),
        ("gemma2", "use_alibi", True),
        ("phi3", "full_attn_mod", 1),
    ],
)
def test_a_field_that_transformers_does_not_read_is_told(variant: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    change_config(folder, **{field: value})
    with pytest.warns(XecoWarning, match=f"{field} = {value!r} is no field of transformers'"):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize("token", [128000, -1])
def test_ids_beyond_a_trimmed_vocabulary_do_not_stop_sampling(token: Any, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", tokenizer=True)
    change_config(folder, bos_token_id=token)
    convert(folder, tmp_path / "out", rank=16, calibration_tokens=64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_follows_the_whole_path_to_the_logits(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "source", variant)
    options = {"rank": 8, "calibration": str(token_file(tmp_path)), "calibration_tokens": 64, "verify": True}
    report = convert(folder, tmp_path / "out", **options)
    assert report.path_error is not None and report.path_error < 1e-5


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_verify_finds_a_tensor_that_is_not_the_source_s(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_checkpoint(tmp_path / "source")
    read = TensorReader.read_chunks
    changed = lambda self, one: (1.01 * part if one == name else part for part in read(self, one))  # noqa: E731
    monkeypatch.setattr(TensorReader, "read_chunks", changed)
    with pytest.raises(VerificationError, match="its attention set aside, differs from the source: logits by"):
        convert(folder, tmp_path / "out", init="paper", rank=8, verify=True)
    assert not (tmp_path / "out").exists()


def test_an_index_may_be_bound_again(tmp_path: Path) -> None:
    """As healing does with the source of the source's model."""
    folder = build_checkpoint(tmp_path / "source")
    write_weights(folder, without_prefix(load_file(folder / "model.safetensors"), "model"))
    once = open_source(CheckpointIndex.open(folder))
    twice = open_source(once.index)
    assert twice.index == once.index and twice.index.stored_names["model.norm.weight"] == "norm.weight"
    TensorReader(twice.index).read("model.norm.weight", dtype=torch.float32)

"""Models of text and images: their text model is converted in its place, and the whole model works as before."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import WITHOUT_PACKAGE, make_key_norms_constant, write_json, write_weights
from fresh import run_fresh
from multimodal_builders import IMAGE_TOKEN, WRAPPED, build_wrapped, image_inputs, wrapped_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    pipeline,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

import xeco_convert
from xeco_convert.calibration.stream import SourceStream
from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.cli.plan_view import plan_summary
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError, VerificationError, XecoError
from xeco_convert.export.pipeline import export_checkpoint
from xeco_convert.families import WRAPPERS, supported_model_types
from xeco_convert.inspect_checkpoint import inspect_checkpoint
from xeco_convert.modeling.configuration_xeco import text_class_prefix
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan
from xeco_convert.report import ConversionReport
from xeco_convert.source import open_source
from xeco_distill.pipeline import heal

pytestmark = pytest.mark.usefixtures("without_plots")  # but for the conversions that tests share
MODELS = ("gemma3", "mistral3", "llava")  # each with a text model, an image encoder and masks of its own
Converted = tuple[Path, Path, ConversionReport]


def convert(source: Path, output: Path, **options: Any) -> ConversionReport:
    """All layers, on random words: what such models write themselves does not reach all directions of their inputs."""
    words = torch.randint(3, IMAGE_TOKEN, (4096,), generator=torch.Generator().manual_seed(5))
    text = source.parent / "words.txt"
    text.write_text(" ".join(f"w{number}" for number in words.tolist()))
    calibrated = {} if options.get("init") == "paper" else {"calibration": str(text), "calibration_tokens": 1024}
    return xeco_convert.convert(source, output, **{"layers": "0-2", **calibrated, **options})


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    made: dict[str, Converted] = {}

    def make(model_type: str) -> Converted:
        if model_type not in made:
            base = tmp_path_factory.mktemp(model_type)
            source = build_wrapped(base / "source", model_type)
            made[model_type] = (source, base / "out", convert(source, base / "out", rank=12, rope_dim=4, verify=True))
        return made[model_type]

    return make


def load(folder: Path) -> PreTrainedModel:
    model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, model_type: str) -> Tensor:
    logits: Tensor = model(**image_inputs(model_type, rows=2)).logits
    return logits


@pytest.mark.parametrize("layout", ["published", "class", "old"])
@pytest.mark.parametrize("model_type", WRAPPED)
def test_every_parameter_is_what_transformers_loads(model_type: str, layout: str, tmp_path: Path) -> None:
    folder = build_wrapped(tmp_path / "source", model_type, layout=layout, num_shards=2)
    source = open_source(CheckpointIndex.open(folder))
    reader = TensorReader(source.index)
    for name, tensor in wrapped_model(model_type).state_dict().items():
        parameter = source.parameter_or_tied(name)
        found = source.read_parameter(parameter, lambda one: reader.read(one, dtype=torch.float32))
        assert torch.equal(found, tensor), name
    assert source.model_type == model_type and source.wrapper == WRAPPERS[model_type]
    assert source.family.module_name(1) in {name for name, _ in source.skeleton.named_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRAPPED)
def test_a_silent_text_config_keeps_what_transformers_fills_in(model_type: str, tmp_path: Path) -> None:
    """Published files leave out what was the default of their day, and the model_type where the wrapper has one in mind."""
    folder = build_wrapped(tmp_path / "source", model_type, layout="old")
    config = json.loads((folder / "config.json").read_text())
    names = ("dtype", "pad_token_id", "rms_norm_eps", "tie_word_embeddings", "architectures", "rope_parameters")
    for name in (*names, *(["model_type"] if model_type in ("gemma3", "llava", "mistral3") else [])):
        config["text_config"].pop(name)
    write_json(folder / "config.json", config)
    xeco_convert.convert(folder, tmp_path / "out", rank=12, layers="1", calibration_tokens=64)
    expected, found = (AutoConfig.from_pretrained(one).text_config for one in (folder, tmp_path / "out"))
    own = {
        "model_type",
        "mla_layers",
        "conversion",
        "auto_map",
        "architectures",
        "_name_or_path",
        "transformers_version",
    }
    assert {**found.to_dict(), **dict.fromkeys(own)} == {**expected.to_dict(), **dict.fromkeys(own)}
    assert found.model_type == f"xeco_{expected.model_type}" and isinstance(found, type(expected))
    load(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRAPPED)
def test_full_width_is_the_source_with_images_as_well(model_type: str, tmp_path: Path) -> None:
    text = "qwen2" if model_type == "internvl" else None
    heads: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    heads = heads if model_type == "gemma3" else {}
    source = build_wrapped(tmp_path / "source", model_type, text, **heads)
    if heads:
        make_key_norms_constant(source, 1.0)
    geometry = open_source(CheckpointIndex.open(source)).geometry
    rank, rope = min(geometry.cache_width, geometry.hidden_size), geometry.num_key_value_heads * geometry.head_dim
    convert(source, tmp_path / "out", rank=rank, rope_dim=rope)
    expected, found = (logits_of(load(folder), model_type) for folder in (source, tmp_path / "out"))
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    inputs = image_inputs(model_type, rows=2)
    with torch.no_grad():
        other = load(source)(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert float((other - expected).norm() / expected.norm()) > 0.02  # the image is seen


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_not_attention_is_copied_and_all_is_verified(
    model_type: str, converted: Callable[[str], Converted]
) -> None:
    source, folder, report = converted(model_type)
    assert report.model_type == f"xeco_{model_type}" and report.path_error is not None and report.path_error < 1e-5
    assert all(layer.exactness_error is not None and layer.exactness_error < 1e-4 for layer in report.layers)
    before, after = load(source).state_dict(), load(folder).state_dict()
    kept = [name for name in before if ".language_model.layers" not in name or ".self_attn." not in name]
    assert any("vision_tower" in name for name in kept)
    for name in kept:
        assert torch.equal(before[name], after[name]), name
    assert any("kv_a_proj_with_mqa" in name for name in after)
    exact_keys = (
        model_type == "gemma3"
    )  # whose keys are normalised: its own projections of them stay in front of the latents
    assert any("k_proj" in name for name in after if "language_model" in name) == exact_keys
    found = inspect_checkpoint(folder)
    assert found["model_type"] == f"xeco_{model_type}" and found["kv_bytes_after"] == report.kv_bytes_after
    assert found["source"]["model_type"] == model_type


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_generation_with_an_image_caches_latents_and_equals_a_run_without_a_cache(
    model_type: str, converted: Callable[[str], Converted]
) -> None:
    model, inputs = load(converted(model_type)[1]), image_inputs(model_type, rows=2)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    output = model.generate(**inputs, **settings, return_dict_in_generate=True)
    for index, layer in enumerate(output.past_key_values.layers):
        widths = model.config.text_config.layer(index)
        assert (layer.keys.shape[1], layer.keys.shape[-1]) == (1, widths.kv_lora_rank)
        assert (layer.values.shape[1], layer.values.shape[-1]) == (1, widths.qk_rope_head_dim)
    if takes_static_caches(load(converted(model_type)[0]), inputs):
        assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), output.sequences)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), output.sequences)


def takes_static_caches(source: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Gemma 3 with an image does not in transformers 5.16, converted or not: its token types are too few for the mask."""
    try:
        source.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    except IndexError:
        return False
    return True


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_left_padding_changes_nothing(model_type: str, converted: Callable[[str], Converted]) -> None:
    model, inputs = load(converted(model_type)[1]), image_inputs(model_type)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    alone = model.generate(**inputs, **settings, return_dict_in_generate=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (3, 0))
    padded = model.generate(**inputs, **settings, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(padded.logits), torch.stack(alone.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*MODELS, "llava_onevision", "smolvlm"])
def test_half_of_the_cache_on_its_own_samples(model_type: str, tmp_path: Path) -> None:
    """Sampled from the whole model, in bfloat16, from sharded files; saved by transformers and loaded again."""
    source = build_wrapped(tmp_path / "source", model_type, dtype=torch.bfloat16, num_shards=3)
    report = xeco_convert.convert(source, tmp_path / "out", kv_size="50%", calibration_tokens=128)
    assert 0.3 < report.kv_share <= 0.5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits_of(again, model_type), logits_of(load(tmp_path / "out"), model_type))


def test_dtype_is_that_of_all_parts(tmp_path: Path) -> None:
    source = build_wrapped(tmp_path / "source", "gemma3")
    convert(source, tmp_path / "out", rank=12, dtype="bfloat16", verify=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Behind WITHOUT_PACKAGE: for each folder, logits of inputs, and a copy saved from it.
REMOTE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
for folder, inputs, logits, copy in zip(*[iter(sys.argv[1:])] * 4):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == model.config.model_type
    inputs = torch.load(inputs)
    with torch.no_grad():
        output = model(**inputs).logits
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), output)
    torch.save(output, logits)
    model.save_pretrained(copy)
assert not any(name.split(".")[0] == "xeco_convert" for name in sys.modules)
"""


@pytest.mark.slow
def test_they_load_where_the_package_is_missing(converted: Callable[[str], Converted], tmp_path: Path) -> None:
    """From the files beside the weights, and from copies that the registered and the remote classes saved."""
    folders = {model_type: converted(model_type)[1] for model_type in MODELS}
    expected = {model_type: logits_of(load(folder), model_type) for model_type, folder in folders.items()}
    load(folders["gemma3"]).save_pretrained(tmp_path / "registered")
    jobs = [*folders.items(), ("gemma3", tmp_path / "registered"), ("gemma3", tmp_path / "0.copy")]
    arguments: list[str] = []
    for number, (model_type, folder) in enumerate(jobs):
        torch.save(image_inputs(model_type, rows=2), tmp_path / f"{number}.inputs")
        arguments += [str(folder), *(str(tmp_path / f"{number}.{what}") for what in ("inputs", "logits", "copy"))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_fresh(WITHOUT_PACKAGE + REMOTE, *arguments, environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, (model_type, _) in enumerate(jobs):
        found = torch.load(tmp_path / f"{number}.logits")
        torch.testing.assert_close(found, expected[model_type], rtol=1e-4, atol=5e-5)
        copied = logits_of(load(tmp_path / f"{number}.copy"), model_type)
        torch.testing.assert_close(copied, expected[model_type], rtol=1e-4, atol=5e-5)


def test_auto_classes_and_a_pipeline_take_text_and_images(tmp_path: Path) -> None:
    source = build_wrapped(tmp_path / "source", "llava")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w90"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokens = {"image_token": "w90", "patch_size": 8, "vision_feature_select_strategy": "default"}
    LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **tokens).save_pretrained(source)
    convert(source, tmp_path / "out", rank=32, rope_dim=16)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor) is LlavaProcessor
    prompt = {"images": Image.new("RGB", (20, 18), (200, 30, 90)), "text": "w3 w90 w5 w7"}
    expected = AutoProcessor.from_pretrained(source)(**prompt, return_tensors="pt")
    found = processor(**prompt, return_tensors="pt")
    assert (found["input_ids"] == IMAGE_TOKEN).sum() == 4
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    write = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    tokens = write.model.generate(**found, max_new_tokens=3, do_sample=False)
    text = write(**prompt, max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text.split() == processor.decode(tokens[0, found["input_ids"].shape[1] :], skip_special_tokens=True).split()


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_auto_classes_know_every_converted_model_by_its_name(model_type: str) -> None:
    config = AutoConfig.for_model(f"xeco_{model_type}")
    prefix = f"Xeco{WRAPPERS[model_type]}Multimodal"
    assert type(config).__name__ == f"{prefix}Config" and isinstance(config, type(AutoConfig.for_model(model_type)))
    assert AutoModel._model_mapping[type(config)].__name__ == f"{prefix}Model"
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        assert auto._model_mapping[type(config)].__name__ == f"{prefix}ForConditionalGeneration"
    source = type(AutoConfig.for_model(model_type))
    assert PROCESSOR_MAPPING[type(config)] is PROCESSOR_MAPPING[source]
    for mapping in (IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING, TOKENIZER_MAPPING):
        names = mapping._model_mapping
        assert names.get(f"xeco_{model_type}") == names.get(model_type) and (type(config) in mapping) == (
            source in mapping
        )
    assert set(WRAPPED) == set(WRAPPERS)


def test_text_models_are_found_by_the_names_of_their_classes() -> None:
    found = {name: text_class_prefix(f"xeco_{name}") for name in supported_model_types()}
    assert found == {name: spec.class_prefix for name, spec in supported_model_types().items()}


@pytest.mark.parametrize(
    ("model_type", "text", "field"),
    [("gemma3", "gemma3", "final_logit_softcapping"), ("llava", "granite", "logits_scaling")],
)
@torch.no_grad()
def test_what_a_text_model_alone_does_to_its_logits_is_left_out_as_in_transformers(
    model_type: str, text: str, field: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {field: 0.5}
    folder = build_wrapped(tmp_path / "source", model_type, text, **changes)
    plan = make_plan(CheckpointIndex.open(folder), ConvertOptions(rank=8))
    ids = torch.randint(3, IMAGE_TOKEN, (1, 8))
    windows = CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="random")
    stream = SourceStream(plan.source, windows, torch.device("cpu"))
    for view in stream.layers():
        hidden = view.run(view.inputs)
    found = stream.output_head().logits(hidden[0])
    torch.testing.assert_close(found, load(folder)(ids).logits[0], rtol=1e-4, atol=1e-4)


def test_verify_finds_a_tensor_that_is_not_the_source_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    read, wrong = TensorReader.read_chunks, "model.language_model.norm.weight"
    changed = lambda self, one: (1.01 * part if one == wrong else part for part in read(self, one))  # noqa: E731
    monkeypatch.setattr(TensorReader, "read_chunks", changed)
    with pytest.raises(VerificationError, match="its attention set aside, differs from the source: logits by"):
        convert(folder, tmp_path / "out", init="paper", rank=8, rope_dim=4, verify=True)


def test_experts_within_a_model_of_text_and_images_are_copied(tmp_path: Path) -> None:
    source = build_wrapped(tmp_path / "source", "internvl", "qwen3_moe")
    report = convert(source, tmp_path / "out", rank=12, rope_dim=4, verify=True)
    assert report.path_error is not None and report.path_error < 1e-5
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again"), "internvl"), logits_of(model, "internvl"))


def test_a_plan_names_the_whole_model_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    index = CheckpointIndex.open(folder)
    assert plan_summary(make_plan(index, ConvertOptions(rank=8)))["model_type"] == "llava"
    with pytest.raises(OptionError, match=r"--portable: .* it is part of a model of text and images"):
        make_plan(index, ConvertOptions(rank=8, portable=True))
    config = json.loads((folder / "config.json").read_text())
    write_json(
        folder / "config.json", {**config, "vision_config": {**config["vision_config"], "num_hidden_layers": 10**9}}
    )
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000, but the weights hold"):
        make_plan(CheckpointIndex.open(folder), ConvertOptions(rank=8))


def test_export_and_healing_refuse_before_any_work(converted: Callable[[str], Converted], tmp_path: Path) -> None:
    folder = converted("llava")[1]
    with pytest.raises(UnsupportedModelError, match=r"xeco_llava model is one of text and images, .*docs/faq.md"):
        export_checkpoint(folder, tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match=r"xeco_llava model is one of text and images, .*docs/faq.md"):
        heal(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["text_config", "vision_config"])
def test_quantised_parts_are_to_be_dequantised_first(where: str, tmp_path: Path) -> None:
    folder = build_wrapped(tmp_path / "source", "mistral3")
    config = json.loads((folder / "config.json").read_text())
    config[where]["quantization_config"] = {"quant_method": "fp8"}
    write_json(folder / "config.json", config)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)"):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize("value", [[], -1, {"a": 1}])
@pytest.mark.parametrize("model_type", ["gemma3", "idefics3"])
def test_odd_settings_of_any_part_end_in_a_plan_or_a_sentence(model_type: str, value: Any, tmp_path: Path) -> None:
    index = CheckpointIndex.open(build_wrapped(tmp_path / "source", model_type))
    parts = {name: part for name, part in index.config.items() if isinstance(part, dict)}
    odd = [{**index.config, name: value} for name in index.config]
    odd += [{**index.config, where: {**part, name: value}} for where, part in parts.items() for name in part]
    refused = 0
    for config in odd:
        try:
            make_plan(dataclasses.replace(index, config=config), ConvertOptions(rank=8))
        except XecoError:
            refused += 1
    assert refused > len(odd) // 4


def with_a_tensor(folder: Path, name: str, tensor: Tensor) -> Path:
    write_weights(folder, {**load_file(folder / "model.safetensors"), name: tensor})
    return folder


def test_tensors_of_the_image_encoder_without_a_place_are_refused_unless_transformers_passes_over_them(
    tmp_path: Path,
) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    with_a_tensor(folder, "vision_tower.vision_model.extra.weight", torch.ones(4))
    with pytest.raises(CheckpointError, match=r"vision_tower.vision_model.extra.weight is no tensor of a llava model"):
        open_source(CheckpointIndex.open(folder))

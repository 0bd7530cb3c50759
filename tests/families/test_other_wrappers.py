"""Models around text models that are not converted whole: what their refusals advise works, followed to the letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import source_config, write_json, write_tokenizer
from multimodal_builders import IMAGE_TOKEN, WRAPPED, build_wrapped, wrapped_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.families import WRAPPERS
from xeco_convert.pretrained import read_config
from xeco_convert.source import open_source

FAQ = Path(__file__).resolve().parents[2] / "docs" / "faq.md"
OTHERS: dict[str, dict[str, Any]] = {
    "vipllava": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
    "qwen2_audio": {"text_config": {"model_type": "qwen2"}, "audio_config": {"model_type": "qwen2_audio_encoder"}},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_models_around_a_supported_text_model_are_refused_with_what_works(
    model_type: str, tmp_path: Path
) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    write_json(folder / "config.json", {"model_type": model_type, **OTHERS[model_type]})
    with pytest.raises(
        UnsupportedModelError, match=r"whole models are converted for gemma3, .*docs/faq.md says how to save"
    ):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize(
    ("model_type", "text"), [("qwen2_5_vl", "qwen2_5_vl_text"), ("blip-2", "opt"), ("llava", "opt"), ("llava", "gemma")]
)
def test_models_around_other_text_models_are_refused(model_type: str, text: str, tmp_path: Path) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    write_json(folder / "config.json", {"model_type": model_type, "text_config": {"model_type": text}})
    with pytest.raises(UnsupportedModelError, match=rf"wraps a text model \('{text}'\), which is no supported family"):
        open_source(CheckpointIndex.open(folder))


@pytest.mark.parametrize("model_type", WRAPPED)
def test_absurd_counts_in_any_part_are_a_sentence(model_type: str) -> None:
    """transformers makes a name for each of num_labels: a billion of them takes all memory."""
    config = wrapped_config(model_type)
    for part in ("text_config", "vision_config"):
        for field in ("num_labels", "num_hidden_layers", "num_attention_heads"):
            with pytest.raises(CheckpointError, match=rf"expected {field} to be at most 100000, found 1000000000"):
                read_config({**config, part: {**config[part], field: 10**9}})


def advice() -> str:
    """The code in docs/faq.md that saves a text model alone."""
    answer = FAQ.read_text(encoding="utf-8").split("**Vision-language models?**")[1].split("\n**")[0]
    assert all(f"`{model_type}`" in answer for model_type in WRAPPERS)
    return answer.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "llava", "vipllava", "qwen2_audio"])
def test_the_advice_for_saving_a_text_model_alone_works(model_type: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if model_type in OTHERS:
        build_other(source, model_type)
    else:
        build_wrapped(source, model_type)
    exec(advice(), {"IN": source, "TEXT": tmp_path / "text"})
    report = xeco_convert.convert(tmp_path / "text", tmp_path / "out", rank=16, calibration_tokens=128, verify=True)
    assert report.path_error is not None and report.path_error < 1e-5
    ids = torch.randint(3, IMAGE_TOKEN, (1, 9))
    with torch.no_grad():
        expected = AutoModelForMultimodalLM.from_pretrained(source)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "text")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if model_type != "qwen2_audio":  # for which transformers expects byte pairs, and these are words
        tokens = [
            AutoTokenizer.from_pretrained(folder)("w3 w17 w5").input_ids for folder in (source, tmp_path / "text")
        ]
        assert tokens[0] == tokens[1] == [3, 17, 5]


def test_the_advice_for_pickled_weights_works(tmp_path: Path) -> None:
    folder = build_wrapped(tmp_path / "source", "llava")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    advice = r'AutoModelForMultimodalLM.from_pretrained\(folder, dtype="auto"\).save_pretrained'
    with pytest.raises(CheckpointError, match=advice):
        CheckpointIndex.open(folder)
    AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path / "new")
    open_source(CheckpointIndex.open(tmp_path / "new"))


def build_other(folder: Path, model_type: str) -> None:
    """A tiny model around a supported text model that is not converted whole."""
    fields = OTHERS[model_type]
    settings: dict[str, Any] = {"text_config": source_config(fields["text_config"]["model_type"])}
    if model_type == "vipllava":
        vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings["vision_config"] = {**fields["vision_config"], **vision, "image_size": 16, "patch_size": 8}
        settings |= {"vision_feature_layers": [-1, -2]}
    else:
        audio = {"d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        settings["audio_config"] = {**fields["audio_config"], **audio}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)

"""Converted models survive save_pretrained and from_pretrained, with this package and without it (trust_remote_code)."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import WITHOUT_PACKAGE, random_ids, save_exact_checkpoint
from fresh import run_fresh
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CODE_FILES = {
    "configuration_xeco.py",
    "modeling_xeco.py",
    "arguments_xeco.py",
    "layer_xeco.py",
    "attention_xeco.py",
    "xeco_latent_attention.py",
    "xeco_choice.py",
}
# Behind WITHOUT_PACKAGE: loads argv[1], writes its logits to argv[2] and a copy of it to argv[3].
REMOTE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder, logits, copy in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == model.config.model_type
    with torch.no_grad():
        output = model(ids, use_cache=True)
        step = model(ids[:, :1], past_key_values=output.past_key_values).logits
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), output.logits)
    torch.save((output.logits, step), logits)
    model.save_pretrained(copy)
assert not any(name.split(".")[0] == "xeco_convert" for name in sys.modules)
"""


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(ids, use_cache=True)
    return output.logits.clone(), model(ids[:, :1], past_key_values=output.past_key_values).logits


def assert_same_logits(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Remote code runs in plain torch, which rounds otherwise: 1.2e-5 was observed, at logits of about 1."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-5)


def run_remote(
    ids: torch.Tensor, folders: list[Path], work: Path
) -> list[tuple[tuple[torch.Tensor, torch.Tensor], Path]]:
    """Logits of each folder and the copy saved from it, in one fresh interpreter without this package."""
    work.mkdir()
    torch.save(ids, work / "ids.pt")
    jobs = [(folder, work / f"{number}.pt", work / f"copy{number}") for number, folder in enumerate(folders)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules")}
    arguments = [str(path) for job in jobs for path in job]
    done = run_fresh(WITHOUT_PACKAGE + REMOTE, str(work / "ids.pt"), *arguments, environment=environment, folder=work)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: xeco_convert is not installed; attention runs in plain torch") == 1
    return [(torch.load(logits), copy) for _, logits, copy in jobs]


def test_a_saved_copy_gives_the_same_logits(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = random_ids(2, 12)
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    assert type(again) is type(model)
    assert_same_logits(logits_of(again, ids), logits_of(model, ids))


def test_a_saved_copy_has_the_configuration_of_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    config = AutoConfig.from_pretrained(tmp_path / "copy")
    assert config.mla_layers == model.config.mla_layers
    assert config.kv_cache_numbers_per_token() == model.config.kv_cache_numbers_per_token()
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["model_type"].startswith("xeco_")
    assert {name.partition(".")[0] for name in written["auto_map"].values()} == {"configuration_xeco", "modeling_xeco"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} >= CODE_FILES


def test_tied_embeddings_stay_tied_in_a_saved_copy(model_of: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = model_of("hybrid")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_nothing_is_missing_or_left_over_when_a_converted_folder_is_loaded(
    folder_of: Callable[[str], tuple[Path, Path]],
) -> None:
    for kind in ("llama", "llama_yarn_norm", "qwen2_low_rank_queries", "hybrid"):
        _, info = AutoModelForCausalLM.from_pretrained(folder_of(kind)[1], output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_load_in_the_dtype_that_is_asked_for(dtype: torch.dtype, converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # frequencies keep float32 whatever the weights are, as in the source's class
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_rotary_frequencies_are_filled_after_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    buffers = {name: buffer for name, buffer in again.named_buffers() if "original" not in name}
    assert buffers
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0)


def test_the_auto_classes_know_the_converted_types(converted: Path) -> None:
    model, base = AutoModelForCausalLM.from_pretrained(converted), AutoModel.from_pretrained(converted)
    assert type(model).__name__ == "XecoLlamaForCausalLM" and type(base).__name__ == "XecoLlamaModel"
    assert type(AutoConfig.from_pretrained(converted)).__name__ == "XecoLlamaConfig"
    assert type(model).__module__.startswith("xeco_convert.")
    ids = random_ids(1, 5)
    torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), model(ids).logits)


def test_the_tokenizer_of_the_source_comes_along(llama: Path, converted: Path) -> None:
    source, copied = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(converted)
    assert copied("w5 w9 w80").input_ids == source("w5 w9 w80").input_ids == [5, 9, 80]
    assert copied.chat_template == source.chat_template is not None


@pytest.mark.parametrize("offloaded", [{1}, {0, 1, 2}])
def test_layers_may_be_offloaded(
    model_of: Callable[[str], PreTrainedModel],
    folder_of: Callable[[str], tuple[Path, Path]],
    offloaded: set[int],
    tmp_path: Path,
) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places.update({f"model.layers.{layer}": "disk" if layer in offloaded else "cpu" for layer in range(3)})
    loaded = AutoModelForCausalLM.from_pretrained(
        folder_of("llama")[1], device_map=places, offload_folder=str(tmp_path / "offload")
    ).eval()
    ids = random_ids(2, 12)
    assert_same_logits(logits_of(loaded, ids), logits_of(model_of("llama"), ids))


@pytest.mark.slow
def test_checkpoints_load_where_the_package_is_missing(
    model_of: Callable[[str], PreTrainedModel],
    folder_of: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    """From xeco-convert's own files, from a copy that the registered class saved, and from copies of copies."""
    ids = random_ids(2, 12)
    kinds = ["llama_yarn_norm", "qwen2_window", "hybrid", "mistral_window"]
    folders = [folder_of(kind)[1] for kind in kinds]
    for kind in ("llama_yarn_norm", "hybrid"):
        model_of(kind).save_pretrained(tmp_path / f"registered_{kind}")
        folders.append(tmp_path / f"registered_{kind}")
        kinds.append(kind)
    for kind in ("llama_exact", "qwen3_exact"):
        folders.append(save_exact_checkpoint(tmp_path / kind, model_of(kind)))
        kinds.append(kind)
    expected = [logits_of(model_of(kind), ids) for kind in kinds]
    first = run_remote(ids, folders, tmp_path / "first")
    for (found, copy), wanted in zip(first, expected, strict=True):
        assert_same_logits(found, wanted)
        assert {path.name for path in copy.iterdir()} >= CODE_FILES
    for (found, _), wanted in zip(
        run_remote(ids, [copy for _, copy in first], tmp_path / "second"), expected, strict=True
    ):
        assert_same_logits(found, wanted)
    for (_, copy), wanted in zip(first, expected, strict=True):
        assert_same_logits(logits_of(AutoModelForCausalLM.from_pretrained(copy).eval(), ids), wanted)

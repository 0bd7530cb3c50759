"""The index of a checkpoint: what headers and config.json say, and nothing read besides."""

from pathlib import Path

import pytest
import torch
from builders import build_checkpoint, write_json
from safetensors.torch import load_file, save_file

from xeco_convert.checkpoint import CheckpointIndex, TensorHeader
from xeco_convert.checkpoint.index import read_json
from xeco_convert.errors import CheckpointError


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_headers_are_those_of_the_stored_tensors(tmp_path: Path, num_shards: int, dtype: torch.dtype) -> None:
    folder = build_checkpoint(tmp_path / "in", "qwen2", num_shards=num_shards, dtype=dtype)
    index = CheckpointIndex.open(folder)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert dict(index.headers) == {
        key: TensorHeader(name=key, dtype=name, shape=tuple(tensor.shape)) for key, tensor in stored.items()
    }
    assert all(index.headers[key].num_bytes == tensor.nbytes for key, tensor in stored.items())
    assert index.hub_id is None and index.config["model_type"] == "qwen2"


def test_tensors_that_the_index_does_not_assign_to_a_file_are_not_seen(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_json(folder / "config.json", {})
    for file, value in (("a.safetensors", 1.0), ("b.safetensors", 2.0)):
        save_file({"x": torch.full((2,), value), file[0]: torch.zeros(1)}, folder / file)
    weight_map = {"x": "b.safetensors", "a": "a.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    index = CheckpointIndex.open(folder)
    assert {name: file.name for name, file in index.files.items()} == weight_map


def test_companions_are_tokenizer_templates_settings_and_licences(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "in", tokenizer=True)
    for name in ("LICENSE.txt", "NOTICE", "merges.txt", "tokenizer.model", "USE_POLICY.md", "README.md", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = [path.as_posix() for path in CheckpointIndex.open(folder).companion_files()]
    assert found == sorted(found)
    assert set(found) == {
        "LICENSE.txt",
        "NOTICE",
        "merges.txt",
        "tokenizer.model",
        "USE_POLICY.md",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    }


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"llama"', "\xff\xfe", '{"a": ' + "1" * 5000 + "}", "[" * 100_000]
)
def test_files_that_hold_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: expected (a )?JSON"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(
        CheckpointError, match=r"config\.json: expected JSON, found what cannot be read \(Is a directory\)"
    ):
        read_json(tmp_path / "config.json")

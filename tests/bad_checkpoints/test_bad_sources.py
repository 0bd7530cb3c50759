"""Damaged or unfit sources: exit code 1 and one sentence with what, where, expected and found; nothing is written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_json
from safetensors.torch import load_file, save_file

Refuse = Callable[..., Any]
PAPER = ("--init", "paper", "--rank", 12)
QUERY = "model.layers.1.self_attn.q_proj.weight"
KEY = "model.layers.2.self_attn.k_proj.weight"
WEIGHTS = "model.safetensors"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    write_json(file, index)


def assert_refused(refuse: Refuse, folder: Path, *words: str) -> None:
    sentence = refuse(1, folder, folder.parent / "out", *PAPER, "--quiet").sentence
    assert sentence.startswith("xeco-convert: ")
    for word in words:
        assert word in sentence


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown family": ({"model_type": "gpt2"}, ("'gpt2' is not a supported family", "llama", "mistral", "qwen2")),
    "no family": ({"model_type": None}, ("expected a model_type, found None",)),
    "converted": ({"model_type": "xeco_llama"}, ("already converted", "xeco-convert inspect")),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        ("quantised (bitsandbytes)", "expected float32, bfloat16 or float16", "dequantised copy"),
    ),
    **{
        method: (
            {"quantization_config": {"quant_method": method, "bits": 4}},
            (f"quantised ({method})", "expected float32, bfloat16 or float16", "dequantised copy"),
        )
        for method in ("fp8", "gptq", "awq")
    },
    "vision-language": (
        {"model_type": "vipllava", "text_config": {"model_type": "llama"}},
        ("'vipllava' wraps a text model ('llama')", "docs/faq.md says how to save it"),
    ),
    "encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("'bert' is no decoder of text alone",)),
    "odd quantisation": ({"quantization_config": ["awq"]}, ("quantised",)),
    "rotary type": ({"rope_parameters": {"rope_type": "unheard of"}}, ("rotary type 'unheard of'", "yarn")),
    "rotary type without its factors": (
        {"rope_parameters": {"rope_type": "longrope"}},
        ("transformers", "Missing required keys", "long_factor"),
    ),
    "rotary settings": ({"rope_parameters": [1]}, ("rope_parameters", "value [1]")),
    "partial rotary": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ("rotates whole heads of 8 rows, found settings that rotate 4", "remove partial_rotary_factor"),
    ),
    "layers of another model": ({"layer_types": ["full_attention"] * 7}, ("`layer_types` (7)",)),
    "half a position": ({"max_position_embeddings": 512.5}, ("'max_position_embeddings' expected int",)),
    "no cache": ({"use_cache": None}, ("'use_cache' expected bool",)),
    "activation": ({"hidden_act": "no such function"}, ("cannot build the model", "no such function")),
    "heads and groups": ({"num_key_value_heads": 3}, ("multiple of num_key_value_heads, found 4 and 3",)),
    "odd head": ({"head_dim": 7}, ("config.json", "7")),
    "no heads": ({"num_attention_heads": None}, ("'num_attention_heads' expected int, got NoneType",)),
    "text for a number": ({"hidden_size": "32"}, ("'hidden_size' expected int, got str (value: '32')",)),
    "more layers": ({"num_hidden_layers": 4}, ("model.layers.3.", "is missing", "download")),
    "fewer layers": ({"num_hidden_layers": 2}, (WEIGHTS, "model.layers.2.", "no tensor of a llama model")),
    "far more layers": (
        {"num_hidden_layers": 10**9},
        ("num_hidden_layers is 1000000000, but the weights hold 30 tensors",),
    ),
    "wider": ({"hidden_size": 64, "head_dim": 8}, ("has the shape", "expected", "from config.json")),
    "biases": ({"attention_bias": True}, ("self_attn.q_proj.bias [32] is missing",)),
    "tied": ({"vocab_size": 97}, ("[96, 32], expected [97, 32]",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(source: Path, refuse: Refuse, case: str) -> None:
    changes, words = CONFIGS[case]
    change_config(source, **changes)
    assert_refused(refuse, source, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("config.json: not found", "Hugging Face checkpoint folder")),
        ("", ("config.json: expected JSON",)),
        ("model_type: llama", ("config.json: expected JSON",)),
        ('["llama"]', ("config.json: expected a JSON object, found list",)),
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(
    source: Path, refuse: Refuse, text: str | None, words: tuple[str, ...]
) -> None:
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    assert_refused(refuse, source, str(source), *words)


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def replace(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


NORM = "model.layers.1.input_layernorm.weight"
HEAD = "lm_head.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "missing projection": (lambda t: t.pop(KEY), (f"{KEY} [16, 32] is missing", "download")),
    "missing norm": (lambda t: t.pop(NORM), (f"{NORM} [32] is missing",)),
    "missing head": (lambda t: t.pop(HEAD), (f"{HEAD} [96, 32] is missing",)),
    "transposed": (
        lambda t: t.update({KEY: t[KEY].T.contiguous()}),
        (f"{KEY} has the shape [32, 16], expected [16, 32]",),
    ),
    "another rank": (
        lambda t: t.update({QUERY: t[QUERY].flatten()}),
        (f"{QUERY} has the shape [1024], expected [32, 32]",),
    ),
    "no numbers": (replace(KEY, torch.zeros(0, 32)), ("has the shape [0, 32]",)),
    "integers": (
        replace(QUERY, torch.zeros(32, 32, dtype=torch.int8)),
        (f"{QUERY} has the dtype I8, expected F32, BF16, F16",),
    ),
    "eight bits": (
        replace(HEAD, torch.zeros(96, 32).to(torch.float8_e4m3fn)),
        ("has the dtype F8_E4M3", "dequantised"),
    ),
    "float64": (replace(NORM, torch.ones(32, dtype=torch.float64)), ("has the dtype F64",)),
    "unknown": (
        replace("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
        ("q_norm.weight is no tensor of a llama model",),
    ),
    "biases without a setting": (
        replace("model.layers.0.self_attn.q_proj.bias", torch.ones(32)),
        ("q_proj.bias is no tensor",),
    ),
    "NaN in queries": (set_value(QUERY, float("nan")), (f"{QUERY} holds NaN or infinite values, expected finite",)),
    "infinity in keys": (set_value(KEY, float("inf")), (f"{KEY} holds NaN or infinite",)),
    "NaN in the input norm": (set_value(NORM, float("nan")), (f"{NORM} holds NaN or infinite",)),
    "NaN in a copied matrix": (set_value(HEAD, float("nan")), (f"{HEAD} holds NaN or infinite",)),
    "infinity in the embedding": (
        set_value("model.embed_tokens.weight", -float("inf")),
        ("embed_tokens.weight holds",),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_missing_misshapen_or_not_finite_are_refused(source: Path, refuse: Refuse, case: str) -> None:
    change, words = TENSORS[case]
    change_tensors(source, change)
    assert_refused(refuse, source, str(source), *words)


def test_values_that_are_not_finite_are_refused_before_an_old_output_goes(source: Path, refuse: Refuse) -> None:
    """The old output is part of what `refuse` compares."""
    (source.parent / "out").mkdir()
    (source.parent / "out" / "old.txt").write_text("old")
    change_tensors(source, set_value(HEAD, float("nan")))
    sentence = refuse(1, source, source.parent / "out", *PAPER, "--overwrite", "--quiet").sentence
    assert "holds NaN" in sentence


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def with_entry(data: bytes, **changes: Any) -> bytes:
    header, rest = header_of(data)
    header[QUERY] = {**header[QUERY], **changes}
    return with_header(header, rest)


FILES: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "empty": (lambda d: b"", ("truncated: 0 bytes", "download it again")),
    "a few bytes": (lambda d: d[:5], ("truncated: 5 bytes",)),
    "cut in the header": (lambda d: d[:100], ("truncated: the header needs", "the file has 100")),
    "cut in the data": (lambda d: d[:-1], ("not a whole safetensors file", "download it again")),
    "longer": (lambda d: d + b"\0", ("not a whole safetensors file",)),
    "oversized header": (
        lambda d: struct.pack("<Q", 2**62) + d[8:],
        ("the header claims 4611686018427387904 bytes", "at most"),
    ),
    "large header": (lambda d: struct.pack("<Q", 90_000_000) + d[8:], ("truncated: the header needs 90000008 bytes",)),
    "text": (lambda d: b"<html>404 Not Found</html>", ("the header claims", "no safetensors file")),
    "git lfs pointer": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", ("no safetensors file",)),
    "header is no JSON": (lambda d: with_header(b"x" * 64, header_of(d)[1]), ("not a whole safetensors file",)),
    "header is a list": (lambda d: with_header([1], header_of(d)[1]), ("not a whole safetensors file",)),
    "offsets outside": (lambda d: with_entry(d, data_offsets=[0, 10**9]), ("not a whole safetensors file",)),
    "offsets that overlap": (lambda d: with_entry(d, data_offsets=[0, 4096]), ("not a whole safetensors file",)),
    "shape beyond its bytes": (lambda d: with_entry(d, shape=[64, 32]), ("not a whole safetensors file",)),
    "huge shape": (lambda d: with_entry(d, shape=[2**62, 2**62]), ("not a whole safetensors file",)),
    "unknown dtype": (lambda d: with_entry(d, dtype="Q4"), ("not a whole safetensors file",)),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_weight_files_are_refused(source: Path, refuse: Refuse, case: str) -> None:
    change, words = FILES[case]
    (source / WEIGHTS).write_bytes(change((source / WEIGHTS).read_bytes()))
    assert_refused(refuse, source, str(source / WEIGHTS), *words)


@pytest.mark.parametrize("target", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 7, None])
def test_an_index_that_points_outside_the_folder_is_refused(sharded: Path, refuse: Refuse, target: object) -> None:
    save_file({QUERY: torch.zeros(32, 32)}, sharded.parent / "evil.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update({QUERY: target}))
    assert_refused(
        refuse, sharded, f"{QUERY} points to {target!r}, outside the checkpoint folder", "expected the name of a file"
    )


INDICES: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "no map": (lambda i: i.pop("weight_map"), ("expected a weight_map, found none",)),
    "empty map": (lambda i: i.update(weight_map={}), ("expected a weight_map",)),
    "list": (lambda i: i.update(weight_map=[]), ("expected a weight_map",)),
    "a tensor that is not there": (
        lambda i: i["weight_map"].update({"ghost.weight": "model-00001-of-00003.safetensors"}),
        ("ghost.weight is in model-00001-of-00003.safetensors, where it is not",),
    ),
    "a file that is not there": (
        lambda i: i["weight_map"].update({QUERY: "model-00004-of-00003.safetensors"}),
        ("model-00004-of-00003.safetensors: not found, although the index names it",),
    ),
    "the wrong file": (
        lambda i: i["weight_map"].update({QUERY: "model-00003-of-00003.safetensors"}),
        (f"{QUERY} is in model-00003-of-00003.safetensors, where it is not",),
    ),
    "a tensor left out": (lambda i: i["weight_map"].pop(QUERY), (f"{QUERY} [32, 32] is missing",)),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_wrong_index_is_refused(sharded: Path, refuse: Refuse, case: str) -> None:
    change, words = INDICES[case]
    change_index(sharded, change)
    assert_refused(refuse, sharded, *words)


def test_a_missing_shard_is_named(sharded: Path, refuse: Refuse) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert_refused(refuse, sharded, "model-00002-of-00003.safetensors: not found", "download")


def test_an_index_that_is_no_json_is_refused(sharded: Path, refuse: Refuse) -> None:
    (sharded / "model.safetensors.index.json").write_text("{")
    assert_refused(refuse, sharded, "model.safetensors.index.json: expected JSON")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_out(source: Path, refuse: Refuse, name: str) -> None:
    (source / WEIGHTS).unlink()
    (source / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")
    assert_refused(
        refuse, source, name, "never loaded", "expected model.safetensors", "from_pretrained(", ".save_pretrained("
    )


def test_a_folder_without_weights_is_refused(source: Path, refuse: Refuse) -> None:
    (source / WEIGHTS).unlink()
    assert_refused(refuse, source, "expected model.safetensors or model.safetensors.index.json, found neither")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ("./nowhere: expected a checkpoint folder, found nothing",)),
        ("/no/such/folder", ("expected a checkpoint folder, found nothing", "config.json")),
        ("nobody/nothing", ("nobody/nothing: neither a folder nor a model", "check the path, or the id")),
        ("nothing-at-all", ("neither a folder nor a model",)),
        ("not a name", ("neither a folder nor a model",)),
    ],
)
def test_a_source_that_is_not_there_is_told(tmp_path: Path, refuse: Refuse, name: str, words: tuple[str, ...]) -> None:
    sentence = refuse(1, name, tmp_path / "out", *PAPER).sentence
    for word in words:
        assert word in sentence


def test_a_file_in_place_of_a_folder_is_told(source: Path, refuse: Refuse) -> None:
    sentence = refuse(1, source / WEIGHTS, source.parent / "out", *PAPER).sentence
    assert "expected a checkpoint folder, found a file" in sentence


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", ("config.json: expected JSON",)),
        (
            "config.json",
            '{"model_type": "xeco_gpt"}',
            ("expected a checkpoint converted by xeco-convert", "'xeco_gpt'"),
        ),
        ("config.json", '{"model_type": "xeco_llama", "mla_layers": 3}', ("expected a checkpoint converted",)),
    ],
)
def test_inspect_refuses_what_it_does_not_know(
    tmp_path: Path, refuse: Refuse, name: str, text: str, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(text)
    sentence = refuse(1, "inspect", tmp_path).sentence
    for word in words:
        assert word in sentence


def test_inspect_of_nothing_is_told(tmp_path: Path, refuse: Refuse) -> None:
    assert "config.json: not found" in refuse(1, "inspect", tmp_path / "nowhere").sentence

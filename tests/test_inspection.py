"""What `inspect` tells about a converted checkpoint, with its report and without."""

import json
from pathlib import Path

import pytest
import torch
from builders import build_checkpoint, write_json
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.errors import CheckpointError
from xeco_convert.inspect_checkpoint import inspect_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stated", [True, False])
def test_bytes_are_those_of_the_report_whether_or_not_the_configuration_states_a_dtype(
    dtype: torch.dtype, stated: bool, tmp_path: Path
) -> None:
    source = build_checkpoint(tmp_path / "in", "llama", dtype=dtype)
    if not stated:
        config = json.loads((source / "config.json").read_text())
        write_json(source / "config.json", {key: value for key, value in config.items() if key != "dtype"})
    report = xeco_convert.convert(source, tmp_path / "out", init="paper", rank=12, layers="0,2")
    found = inspect_checkpoint(tmp_path / "out")
    assert (found["kv_bytes_before"], found["kv_bytes_after"]) == (report.kv_bytes_before, report.kv_bytes_after)
    assert found["kv_bytes_before"] == 3 * 32 * dtype.itemsize
    assert [layer["kv_numbers_after"] for layer in found["layers"]] == [16, 32, 16]
    assert [layer.get("key_error") for layer in found["layers"]] == [layer.key_error for layer in report.layers]


def test_a_copy_that_transformers_saved_has_sizes_but_no_errors(converted: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(tmp_path / "copy")
    found, original = inspect_checkpoint(tmp_path / "copy"), inspect_checkpoint(converted)
    assert found["source"] == original["source"] and found["init"] == "paper"
    assert found["kv_bytes_after"] == original["kv_bytes_after"]
    assert not any("key_error" in layer for layer in found["layers"])


def test_widths_that_cannot_be_are_told_with_their_layer(converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["mla_layers"][1]["kv_rank"] = 3
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=r"config\.json: layer 1: .*unknown keys \['kv_rank'\]"):
        inspect_checkpoint(tmp_path)

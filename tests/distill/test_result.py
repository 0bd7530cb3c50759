"""The healed checkpoint holds all that was trained, under whatever names transformers saved it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from xeco_convert.checkpoint import CheckpointIndex
from xeco_distill.publish import write_checkpoint


def test_what_was_saved_under_another_name_is_not_lost(out: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(out, trained)
    stored = load_file(out / "model.safetensors")
    state = {name: tensor.float() + 1 for name, tensor in stored.items()}
    state["model.norm.renamed"] = state.pop("model.norm.weight")
    save_file(state, trained / "model.safetensors", metadata={"format": "pt"})
    write_checkpoint(CheckpointIndex.open(out), CheckpointIndex.open(trained), tmp_path / "result")
    found = load_file(tmp_path / "result" / "model.safetensors")
    assert found.keys() == state.keys()
    assert (
        {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    )
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in found.items())

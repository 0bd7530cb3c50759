"""Models survive pickle, copy and torch.save, in the same process and in one that has only just started."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from builders import exact_model, random_ids, source_model
from fresh import run_fresh
from transformers import PreTrainedModel

VARIANTS = ["llama", "gemma2", "gemma3", "gpt_neox", "smollm3", "qwen3_moe", "phi3"]
# With nothing imported but torch or pickle: what the file names must be found by importing it.
FRESH = """
import pickle, sys, torch
given, file, kind = sys.argv[1:]
ids = torch.load(given)
with open(file, "rb") as handle:
    model = pickle.load(handle) if kind == "pickle" else torch.load(handle, weights_only=False)
with torch.no_grad():
    torch.save(model(ids).logits, given)
print(type(model).__name__)
"""


def made(variant: str) -> PreTrainedModel:
    return exact_model(source_model(variant))


def through_pickle(model: PreTrainedModel) -> PreTrainedModel:
    again: PreTrainedModel = pickle.loads(pickle.dumps(model))
    return again


def through_torch(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: PreTrainedModel = torch.load(file, weights_only=False)
    return again


@pytest.mark.parametrize("copied", [through_pickle, through_torch, copy.deepcopy], ids=["pickle", "torch", "deepcopy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_gives_the_same_logits(variant: str, copied: object) -> None:
    model, ids = made(variant), random_ids(2, 9)
    again = copied(model)  # type: ignore[operator]
    assert type(again) is type(model) and again is not model
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again(ids[:, :3], use_cache=True).logits, model(ids[:, :3]).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kind"), [("llama", "pickle"), ("llama", "torch"), ("gemma3", "torch"), ("gpt_neox", "pickle")]
)
def test_a_fresh_process_reads_a_model_by_the_names_of_its_classes(variant: str, kind: str, tmp_path: Path) -> None:
    model, ids = made(variant), random_ids(1, 7)
    expected = model(ids).logits
    torch.save(ids, tmp_path / "given.pt")
    if kind == "pickle":
        (tmp_path / "model").write_bytes(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model")
    done = run_fresh(FRESH, str(tmp_path / "given.pt"), str(tmp_path / "model"), kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == type(model).__name__
    torch.testing.assert_close(torch.load(tmp_path / "given.pt"), expected)


def test_configurations_survive_pickle() -> None:
    config = made("llama").config
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()

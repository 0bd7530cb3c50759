"""The layer-wise stage computes each layer as the model does, keeps what is finished, and refuses what it cannot aim at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import quick
from safetensors.torch import load_file, save_file

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import OptionError
from xeco_convert.factorize.attention import mla_output
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.data import Document, PackedRows, RowWriter
from xeco_distill.options import DistillOptions
from xeco_distill.pipeline import heal
from xeco_distill.stages.layerwise import LayerwiseStage, same_outside_attention, windows_of


def rows_of(folder: Path, count: int = 24, length: int = 32) -> PackedRows:
    generator = torch.Generator().manual_seed(0)
    writer = RowWriter(folder, length, padding=0)
    for number in range(count):
        size = length if number % 3 else length // 2
        ids = torch.randint(4, 270, (size,), generator=generator).tolist()
        writer.add(Document(ids=ids, learned=[True] * size))
    return writer.finish()


def stage_of(student: Path, source: Path, folder: Path, **options: object) -> LayerwiseStage:
    settings = DistillOptions(**{"layer_tokens": 1024, "layer_steps": 3, **options})
    rows = rows_of(folder / "rows")
    indices = CheckpointIndex.open(student), CheckpointIndex.open(source)
    return LayerwiseStage(*indices, rows, folder / "layers", settings, torch.device("cpu"))


@pytest.fixture(scope="module")
def calibrated_demo(teacher_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "out"
    settings = {"calibration": str(text), "calibration_tokens": 1024, "latent_norm": True}
    xeco_convert.convert(teacher_folder, output, rank=24, rope_dim=16, **settings)
    return output


@pytest.mark.parametrize("init", ["paper", "calibrated"])
@torch.no_grad()
def test_a_layer_computes_what_the_models_attention_does(
    init: str, converted_demo: Path, calibrated_demo: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = converted_demo if init == "paper" else calibrated_demo
    stage = stage_of(folder, teacher_folder, tmp_path)
    model = load_causal_lm(folder, torch.float32).eval()
    for view in stage._stream.layers():
        hidden = view.inputs[:2]
        positions = torch.arange(hidden.shape[1])[None]
        expected, _ = model.model.layers[view.number].self_attn(
            view.normed(hidden), (view.cos, view.sin), None, position_ids=positions
        )
        found = mla_output(stage._own_layer(view.number), 4, view.normed(hidden), stage._context(view))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_documents_of_packed_rows_stay_apart(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    windows = windows_of(rows, 10**6)
    assert windows.ids.shape[0] == 24 and int(windows.counts.sum()) == 16 * 32 + 8 * 16


def test_finished_layers_are_kept_and_not_done_again(
    converted_demo: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(converted_demo, teacher_folder, tmp_path)
    stage.run(lambda what, share, figures: None)
    tensors = stage.tensors()
    (tmp_path / "layers" / "layer-002.pt").unlink()
    calls: list[int] = []
    original = LayerwiseStage._own_layer

    def counted(self: LayerwiseStage, number: int) -> object:
        calls.append(number)
        return original(self, number)

    monkeypatch.setattr(LayerwiseStage, "_own_layer", counted)
    again = stage_of(converted_demo, teacher_folder, tmp_path)
    again.run(lambda what, share, figures: None)
    assert calls == [2]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.tensors().items())


def test_layers_that_see_the_source_are_independent_and_can_be_shared(
    converted_demo: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    whole = stage_of(converted_demo, teacher_folder, tmp_path / "whole", layer_inputs="source")
    whole.run(lambda what, share, figures: None)
    for rank in (1, 0):
        settings = DistillOptions(layer_tokens=1024, layer_steps=3, layer_inputs="source")
        indices = CheckpointIndex.open(converted_demo), CheckpointIndex.open(teacher_folder)
        rows = rows_of(tmp_path / "rows")
        part = LayerwiseStage(*indices, rows, tmp_path / "shared", settings, torch.device("cpu"), share=(rank, 2))
        part.run(lambda what, share, figures: None)
        assert len(list((tmp_path / "shared").glob("layer-*.pt"))) == (2 if rank == 1 else 4)
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in part.tensors().items())


def test_a_student_whose_other_weights_changed_is_not_aimed_at(out: Path, teacher_folder: Path, text: Path) -> None:
    source = CheckpointIndex.open(teacher_folder)
    assert same_outside_attention(CheckpointIndex.open(out), source) is None
    state = load_file(out / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    assert same_outside_attention(CheckpointIndex.open(out), source) == "model.norm.weight"
    with pytest.raises(OptionError, match=r"model.norm.weight differs from it .OUT was trained already."):
        heal(out, quick(data=str(text), stages="layers,kl"))
    report = heal(out, quick(data=str(text), stages=None, budget_tokens=256, restart=True))
    assert "model.norm.weight differs" in report.stages["layers"]["skipped"]


def test_hybrid_models_keep_the_layers_that_were_kept(teacher_folder: Path, tmp_path: Path, text: Path) -> None:
    output = tmp_path / "out"
    xeco_convert.convert(teacher_folder, output, init="paper", rank=24, rope_dim=16, layers="1,3")
    before = load_file(output / "model.safetensors")
    options = quick(data=str(text), stages="layers", layer_tokens=1024, layer_steps=3, keep_original=False)
    heal(output, options)
    after = load_file(output / "model.safetensors")
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1", "3"}
    shutil.rmtree(output)

"""The teacher is found where config.json says, and must speak the student's vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import build_checkpoint, random_ids, source_model
from runs import quick
from safetensors.torch import load_file, save_file

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError
from xeco_convert.pretrained import load_causal_lm
from xeco_distill.errors import DataError, TeacherError
from xeco_distill.pipeline import heal
from xeco_distill.plan import make_healing_plan
from xeco_distill.teacher import check_head, check_vocabulary, find_teacher, output_head


def edit(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}), encoding="utf-8")


def test_the_recorded_source_is_the_teacher(converted_demo: Path, teacher_folder: Path) -> None:
    place = find_teacher(CheckpointIndex.open(converted_demo), None, None)
    assert place.folder == teacher_folder.resolve() and place.is_source


def test_no_source_recorded_asks_for_a_teacher(out: Path, teacher_folder: Path) -> None:
    edit(out, conversion=None)
    with pytest.raises(TeacherError, match=r"records no source to learn from.*give --teacher MODEL"):
        heal(out, quick())
    assert make_healing_plan(out, quick(teacher=str(teacher_folder))).teacher.name == str(teacher_folder)


def test_a_source_that_moved_away_is_named(out: Path) -> None:
    edit(out, conversion={"source": {"path": "/nowhere/model", "model_type": "llama"}})
    with pytest.raises(TeacherError, match=r"/nowhere/model.*If it lies elsewhere now, give --teacher MODEL"):
        heal(out, quick())


def test_a_teacher_that_cannot_be_reached_is_named(out: Path) -> None:
    with pytest.raises(TeacherError, match=r"--teacher: nobody/nothing: neither a folder nor a model"):
        heal(out, quick(teacher="nobody/nothing"))


def test_another_vocabulary_is_refused_by_its_size(out: Path, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", "llama")
    with pytest.raises(TeacherError, match="vocabulary of 96, the student of 277"):
        heal(out, quick(teacher=str(other)))


def test_the_first_token_that_differs_is_named(out: Path, teacher_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items()}
    vocabulary[names[40]], vocabulary[names[41]] = 41, 40
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TeacherError, match=rf"id 40 is '{names[41]}', for the student '{names[40]}'"):
        heal(out, quick(teacher=str(other)))
    check_vocabulary(CheckpointIndex.open(out), find_teacher(CheckpointIndex.open(out), None, None))


def test_a_larger_teacher_of_the_same_vocabulary_teaches(out: Path, teacher_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(teacher_folder)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 160, 5, 5
    config.num_key_value_heads = 5
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher_folder / name, tmp_path / "large" / name)
    options = quick(teacher=str(tmp_path / "large"), stages=None, budget_tokens=512)
    plan = make_healing_plan(out, options)
    assert plan.stages == ("kl",) and "no layer-wise stage" in plan.notes[0]
    report = heal(out, options)
    assert report.after["kl"] < report.before["kl"]
    with pytest.raises(OptionError, match="layers needs the model that OUT was converted from"):
        heal(out, quick(teacher=str(tmp_path / "large"), stages="layers,kl", keep_original=False))


def test_rows_longer_than_the_models_context_are_refused(out: Path) -> None:
    with pytest.raises(OptionError, match=r"--seq-length: expected at most 512.*found 513"):
        heal(out, quick(seq_length=513))


def test_too_little_text_is_refused(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("the cat", encoding="utf-8")
    with pytest.raises(DataError, match="only 1 rows of 64 tokens, expected at least 2"):
        heal(out, quick(data=str(file)))


def test_what_is_no_converted_checkpoint_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint converted by xeco-convert"):
        heal(teacher_folder, quick())
    with pytest.raises(CheckpointError, match="expected a folder that xeco-convert wrote, found nothing"):
        heal(tmp_path / "nothing", quick())


@pytest.mark.parametrize("keep", [True, False])
def test_outputs_that_would_be_lost_are_refused(out: Path, tmp_path: Path, keep: bool) -> None:
    if keep:
        out.with_name("out.before-healing").mkdir()
        with pytest.raises(OptionError, match=r"out.before-healing exists already.*--no-keep-original"):
            heal(out, quick())
        return
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious", encoding="utf-8")
    with pytest.raises(OptionError, match=r"--output: .*other exists already; add --overwrite"):
        heal(out, quick(output=str(tmp_path / "other")))
    foreign = tmp_path / "work"
    foreign.mkdir()
    (foreign / "file").write_text("precious", encoding="utf-8")
    with pytest.raises(OptionError, match="holds files that are no healing run"):
        heal(out, quick(work_dir=str(foreign)))


def test_a_head_that_the_losses_do_not_know_is_refused(converted_demo: Path) -> None:
    model = load_causal_lm(converted_demo, torch.float32)
    check_head(model, "student")
    model.register_forward_hook(lambda module, given, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(UnsupportedModelError, match="changes its logits after the output projection"):
        check_head(model, "student")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.2}),
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    ],
)
def test_scaled_and_capped_logits_are_those_of_the_models_own_forward(name: str, fields: dict[str, object]) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    check_head(model, name)
    assert output_head(model, 60).weight.shape == (60, 32)


@torch.no_grad()
def test_scores_of_a_soft_capped_teacher_are_capped(tmp_path: Path) -> None:
    """Older releases of transformers take an attention for Gemma 2 that leaves the cap out."""
    expected, ids = source_model("gemma2"), random_ids(2, 12)
    model = load_causal_lm(build_checkpoint(tmp_path / "gemma2", "gemma2"), torch.float32).eval()
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    uncapped = source_model("gemma2", attn_logit_softcapping=None)
    assert float((uncapped(ids).logits - expected(ids).logits).abs().max()) > 0.01


def test_weights_that_are_missing_are_not_made_up(out: Path) -> None:
    state = load_file(out / "model.safetensors")
    del state["model.layers.2.self_attn.kv_b_proj.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"hold no model.layers.2.self_attn.kv_b_proj.weight, which the model needs"
    ):
        load_causal_lm(out, torch.float32)

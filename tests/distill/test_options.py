"""Options are checked before anything is read, from the command line and from YAML alike; every recipe loads and dry-runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from xeco_convert.errors import OptionError
from xeco_convert.options import ConvertOptions
from xeco_distill.cli import main
from xeco_distill.cli.heal import distill_command, merge_options
from xeco_distill.options import DistillOptions
from xeco_distill.recipes import load_config, recipe_names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": "kl,layers"}, "--stages: expected some of layers, kl, dpo, once each and in this order"),
        ({"stages": "kl,magic"}, "--stages: expected some of"),
        ({"stages": "dpo"}, "dpo needs data; add --preferences"),
        ({"train": "heads"}, "--train: expected one of attention, norms, all, found heads"),
        ({"budget_tokens": 0}, "--budget-tokens: expected a whole number of at least 1, found 0"),
        ({"seq_length": 1}, "--seq-length: expected a whole number of at least 2"),
        ({"temperature": 0.0}, "--temperature: expected a positive number"),
        ({"ce_weight": 1.5}, "--ce-weight: expected a share from 0 to 1"),
        ({"jsd_beta": 1.0, "loss": "jsd"}, "--jsd-beta: expected a number between 0 and 1"),
        ({"top_k": 8, "loss": "jsd"}, "--top-k: only with --loss forward-kl"),
        ({"trainer": {"output_dir": "x"}}, "--trainer output_dir: this is set by the run; use --output"),
        ({"trainer": {"dpo.seed": 3}}, "--trainer seed: this is set by the run; use --seed"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DistillOptions(**fields)


def test_the_command_line_wins_over_the_recipe() -> None:
    base = {"seq_length": 128, "trainer": {"weight_decay": 0.1, "adam_beta2": 0.9}}
    options = merge_options(base, {"seq_length": 64, "data": None}, ["adam_beta2=0.99", "learning_rate=8e-5"])
    assert options.seq_length == 64 and options.data is None
    assert options.trainer == {"weight_decay": 0.1, "adam_beta2": 0.99, "learning_rate": 8e-5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_lenght: 3", "unknown keys seq_lenght"),
        ("seq-length: many", "seq_length: expected a whole number, found 'many'"),
        ("balance: 3", "balance: expected true or false, found 3"),
        ("- a\n- b", "expected a YAML mapping of options, found list"),
        ("a: [", "not a YAML file"),
        ("healing: {}\nmodel: x", "unknown keys model"),
        ("trainer: 3", "trainer: expected a mapping"),
        ("shape: {hidden_size: 3}\nhealing: {}", "shape: expected the keys"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        load_config(str(file))


def test_a_plain_file_of_options_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seq-length: 128\nlearning_rate: 8e-5\nstages: [layers, kl]\ntrainer:\n  weight_decay: 0.1\n")
    options = merge_options(load_config(str(file)).options, {})
    assert (options.seq_length, options.learning_rate, options.stage_list) == (128, 8e-5, ("layers", "kl"))


def test_an_unknown_recipe_names_the_known() -> None:
    with pytest.raises(OptionError, match="name of a recipe, found neither; recipes: llama-3"):
        load_config("llama-9")


def test_the_published_runs_are_there() -> None:
    names = recipe_names()
    for rank in (512, 256, 128, 64, 48):
        assert f"llama-3.2-1b-r{rank}-paper" in names and f"llama-3.2-1b-r{rank}-calibrated" in names
    for model in ("llama-3.2-3b", "llama-3.1-8b", "smollm-135m", "smollm-360m", "smollm-1.7b"):
        assert {name.rpartition("-")[2] for name in names if name.startswith(model)} == {"paper", "calibrated"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_dry_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_config(name)
    converting, options = ConvertOptions(**dict(recipe.convert or {})), merge_options(recipe.options, {})
    assert converting.init == name.rpartition("-")[2]
    assert options.seq_length == 2048 and options.trainer["lr_scheduler_type"] == "cosine"
    if converting.init == "paper":
        assert converting.q_rank is not None and options.dpo_beta == 0.01 and options.dpo_learning_rate == 5e-7
        assert options.learning_rate in (8e-5, 4e-5) and options.train == "all"
    with pytest.raises(SystemExit) as end:
        main(["--config", name, "--dry-run"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert (
        "memory: about" in printed and "time of the kl stage" in printed and f"xeco-convert {recipe.source}" in printed
    )


def test_a_recipes_sizes_are_those_of_the_model() -> None:
    sizes = load_config("llama-3.2-1b-r64-paper").sizes()
    layer = 1424 * (2048 + 32 * 64) + 2048 * (64 + 32) + 64 * 32 * (32 + 64) + 2048 * 2048
    assert sizes.attention == 16 * layer
    assert sizes.parameters == 16 * (layer + 3 * 2048 * 8192) + 33 * 2048 + 128256 * 2048


def test_dry_run_of_a_checkpoint_writes_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit) as end:
        main([str(out), "--dry-run", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and sorted(out.parent.iterdir()) == before
    assert "teacher: " in printed and "(the source)" in printed and "memory: about" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "OUT is missing"),
        (["/nowhere/out"], 1, "found nothing; check the path"),
        (["out", "--trainer", "x"], 2, "expected NAME=VALUE"),
        (["out", "--config", "nothing"], 2, "found neither"),
    ],
)
def test_faults_are_one_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == code and message in error and error.count("\n") == 1


def test_a_setting_that_transformers_does_not_have_gets_a_hint(out: Path, text: Path) -> None:
    from runs import quick

    from xeco_distill.pipeline import heal

    with pytest.raises(OptionError, match="has no such setting; did you mean weight_decay"):
        heal(out, quick(data=str(text), trainer={"weigth_decay": 0.1}))
    with pytest.raises(OptionError, match="transformers refuses these settings"):
        heal(out, quick(data=str(text), trainer={"lr_scheduler_type": "square"}, restart=True))


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from xeco_distill.cli.heal import require_extras

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"xeco-distill needs accelerate: pip install 'xeco-convert\[distill\]'"):
        require_extras()


def test_every_option_has_help() -> None:
    parameters = distill_command.get_params(click.Context(distill_command))
    flags = {option for parameter in parameters for option in parameter.opts}
    for name in ("--teacher", "--budget-minutes", "--top-k", "--trainer", "--dry-run"):
        assert name in flags
    assert all(parameter.help for parameter in distill_command.params if isinstance(parameter, click.Option))

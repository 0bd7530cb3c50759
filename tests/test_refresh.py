"""`xeco-convert refresh`: an older folder becomes what this version writes, all of it or nothing; weights stay."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_checkpoint
from tokenizer_kinds import KINDS, VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert import refresh
from xeco_convert.cli import main
from xeco_convert.errors import CheckpointError, OptionError, OutputError
from xeco_convert.modeling import code_files
from xeco_convert.refresh import RefreshReport, refresh_checkpoint
from xeco_convert.tokenizer import TokenizerFiles

TEXT = "def f(self):\n    return x[12345]  naïve 中文 👍"
# What the first version's attention began with: it knew the cache by the name that transformers had for it then.
OLD_MODELING = """
class LatentSelfAttention(nn.Module):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is not None:
            latent, rotary = past_key_values.update(latent, rotary, self.layer_idx)
"""


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/ and out/ of Granite with a tokenizer whose named class is not what transformers takes for that model type."""
    base = tmp_path_factory.mktemp("refresh")
    source = build_checkpoint(base / "in", "granite", vocab_size=VOCABULARY)
    KINDS["byte-level, GPT2Tokenizer"](source)
    xeco_convert.convert(source, base / "out", init="paper", rank=8)
    return base


@pytest.fixture
def old(converted_once: Path, tmp_path: Path) -> Path:
    """The folder as the first version wrote it: its code, the source's tokenizer files as they were, older entries."""
    folder = tmp_path / "out"
    shutil.copytree(converted_once / "out", folder)
    (folder / "modeling_xeco.py").write_text(OLD_MODELING, encoding="utf-8")
    (folder / "xeco_choice.py").unlink()
    shutil.copy(converted_once / "in" / "tokenizer_config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_xeco.XecoGraniteConfig"}
    config["conversion"]["tool"] = "xeco-convert 0.0.9"
    for entry in config["mla_layers"]:
        entry.pop("logit_softcap")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_unchanged(report: RefreshReport) -> None:
    assert (report.changed, report.added, report.removed) == ((), (), ())


def test_an_old_folder_becomes_what_this_version_writes(old: Path, converted_once: Path) -> None:
    before, weights = bytes_of(old), (old / "model.safetensors").stat()
    report = refresh_checkpoint(old)
    assert report.changed == ("config.json", "modeling_xeco.py", "tokenizer_config.json")
    assert (report.added, report.removed, report.tokenizer_left) == (("xeco_choice.py",), (), None)
    after, expected = bytes_of(old), bytes_of(converted_once / "out")
    assert set(after) == set(expected)
    assert [name for name in after if after[name] != expected[name]] == ["config.json"]
    config = json.loads(after["config.json"])
    assert config["conversion"].pop("refreshed").startswith("xeco-convert ")
    assert config["conversion"].pop("tool") == "xeco-convert 0.0.9"
    fresh = json.loads(expected["config.json"])
    fresh["conversion"].pop("tool")
    assert config == fresh
    assert before["model.safetensors"] == after["model.safetensors"]
    assert (old / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert sorted(path.name for path in old.parent.iterdir()) == ["out"]


def test_the_refreshed_folder_loads_and_reads_as_the_source(old: Path, converted_once: Path) -> None:
    ids = AutoTokenizer.from_pretrained(converted_once / "in")(TEXT)["input_ids"]
    assert TokenizerFiles(folder=old).load_without_package()(TEXT)["input_ids"] != ids
    refresh_checkpoint(old)
    for tokenizer in (AutoTokenizer.from_pretrained(old), TokenizerFiles(folder=old).load_without_package()):
        assert tokenizer(TEXT)["input_ids"] == ids
    model = AutoModelForCausalLM.from_pretrained(old).eval()
    text = torch.tensor([ids])
    cached, plain = (
        model.generate(text, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()


def test_a_second_run_changes_nothing(old: Path) -> None:
    refresh_checkpoint(old)
    before = bytes_of(old)
    times = {name: (old / name).stat().st_mtime_ns for name in before}
    assert_unchanged(refresh_checkpoint(old))
    assert bytes_of(old) == before and {name: (old / name).stat().st_mtime_ns for name in before} == times


def test_a_folder_of_this_version_is_left_alone(converted_once: Path) -> None:
    before = bytes_of(converted_once / "out")
    assert_unchanged(refresh_checkpoint(converted_once / "out"))
    assert bytes_of(converted_once / "out") == before


def test_copies_and_healed_folders_are_renewed_too(old: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    healed = json.loads((old / "config.json").read_text())
    healed["conversion"]["healing"] = {"tool": "xeco-distill 0.0.9", "stages": ["kl"]}
    (old / "config.json").write_text(json.dumps(healed))
    refresh_checkpoint(old)
    assert json.loads((old / "config.json").read_text())["conversion"]["healing"]["stages"] == ["kl"]
    AutoModelForCausalLM.from_pretrained(old).save_pretrained(copy)
    (copy / "modeling_xeco.py").write_text(OLD_MODELING, encoding="utf-8")
    report = refresh_checkpoint(copy)
    assert "modeling_xeco.py" in report.changed and "tokenizer.json" in report.added
    assert (copy / "modeling_xeco.py").read_bytes() == code_files()["modeling_xeco.py"].read_bytes()
    assert_unchanged(refresh_checkpoint(copy))


def test_a_chat_template_of_the_user_is_kept(old: Path) -> None:
    (old / "chat_template.jinja").write_text("{{ messages[0].content }} my own", encoding="utf-8")
    report = refresh_checkpoint(old)
    assert "tokenizer_config.json" in report.changed
    assert AutoTokenizer.from_pretrained(old).chat_template == "{{ messages[0].content }} my own"
    assert_unchanged(refresh_checkpoint(old))


def test_a_spoilt_tokenizer_is_taken_from_the_source(old: Path, converted_once: Path) -> None:
    data = json.loads((old / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (old / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert "tokenizer.json" in refresh_checkpoint(old).changed
    found, expected = (AutoTokenizer.from_pretrained(folder) for folder in (old, converted_once / "in"))
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert_unchanged(refresh_checkpoint(old))


def test_a_source_that_moved_away_leaves_the_tokenizer_and_says_so(old: Path, converted_once: Path) -> None:
    config = json.loads((old / "config.json").read_text())
    config["conversion"]["source"]["path"] = "/nowhere/model"
    (old / "config.json").write_text(json.dumps(config))
    report = refresh_checkpoint(old)
    assert report.changed == ("config.json", "modeling_xeco.py")
    assert report.tokenizer_left is not None
    assert "/nowhere/model" in report.tokenizer_left and "give --source IN" in report.tokenizer_left
    again = refresh_checkpoint(old, converted_once / "in")
    assert "tokenizer_config.json" in again.changed and again.tokenizer_left is None
    for conversion in ({**config["conversion"], "source": None}, None):
        (old / "config.json").write_text(json.dumps({**config, "conversion": conversion}))
        assert "records no source" in str(refresh_checkpoint(old).tokenizer_left)


def test_other_folders_are_refused_and_stay_as_they_are(old: Path, converted_once: Path, tmp_path: Path) -> None:
    def refused(folder: Path, sentence: str, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        before = bytes_of(folder)
        with pytest.raises(CheckpointError, match=sentence):
            refresh_checkpoint(folder)
        assert bytes_of(folder) == before

    source = tmp_path / "in"
    shutil.copytree(converted_once / "in", source)
    refused(source, "expected a checkpoint converted by xeco-convert, found model_type 'granite'; convert it first")
    refused(source, "found model_type 'xeco_nothing'", model_type="xeco_nothing")
    refused(source, "found model_type 'xeco_granite'", model_type="xeco_granite")
    (source / "xeco_export.json").write_text("{}")
    refused(source, "is an export.*refresh the converted folder, then export that again")
    conversion = json.loads((old / "config.json").read_text())["conversion"]
    refused(old, "format_version: expected at most 1, found 2", conversion={**conversion, "format_version": 2})
    refused(old, "unknown keys", conversion=conversion, mla_layers=[{"kv_lora_rank": 1, "of_later": 2}])
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        refresh_checkpoint(tmp_path / "nothing")


def test_another_model_is_refused_as_source(old: Path, llama: Path) -> None:
    before = bytes_of(old)
    with pytest.raises(OptionError, match=r"--source: .*expected the granite model .*found model_type 'llama'"):
        refresh_checkpoint(old, llama)
    with pytest.raises(OptionError, match=r"--source: /nowhere: expected a checkpoint folder, found nothing"):
        refresh_checkpoint(old, "/nowhere")
    assert bytes_of(old) == before


@pytest.mark.parametrize("number", range(4))
def test_a_failure_half_way_leaves_everything_as_it_was(
    old: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace, calls = bytes_of(old), os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == number + 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(refresh.os, "replace", failing)
    with pytest.raises(OutputError, match=r"cannot be written .No space left on device.; nothing was changed"):
        refresh_checkpoint(old)
    assert bytes_of(old) == before and len(calls) > number
    assert sorted(path.name for path in old.parent.iterdir()) == ["out"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_the_command_says_what_changed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "refresh", str(old))
    assert code == 0
    assert said == "changed: config.json, modeling_xeco.py, tokenizer_config.json\nadded: xeco_choice.py\n"
    code, said, _ = run(capsys, "refresh", str(old))
    assert (code, said) == (0, f"{old}: nothing to renew, it is as this version writes it\n")
    code, said, _ = run(capsys, "refresh", str(old), "--json")
    assert code == 0 and json.loads(said)["changed"] == []
    code, _, error = run(capsys, "refresh", str(old), "--source", "/nowhere")
    assert code == 2 and "--source: /nowhere" in error

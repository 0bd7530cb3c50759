"""The demo compares generation with a cache, without one and in a batch, and fails where they differ."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import xeco_convert
from xeco_convert.cli.convert import convert_command
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.__main__ import check_generation, demo_command
from xeco_convert.errors import VerificationError
from xeco_convert.modeling import LatentSelfAttention

PROMPT = "Otto was a clever boy, and Ella was his best friend. She had"


@pytest.fixture(scope="module")
def converted_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    xeco_convert.convert(MODEL_FOLDER, out, rank=64, rope_dim=16, init="paper")
    return out


def test_a_converted_model_passes(converted_demo: Path) -> None:
    check_generation(converted_demo, PROMPT)


def test_a_cache_that_attention_does_not_read_is_found(converted_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 5.24 once did by giving the cache another name."""
    monkeypatch.setattr(LatentSelfAttention, "_update", lambda _self, _cache, c_kv, k_rope: (c_kv, k_rope))
    with pytest.raises(
        VerificationError, match=r"expected the same greedy text with the cache as without a cache, found"
    ):
        check_generation(converted_demo, PROMPT)


def test_padding_that_attention_does_not_skip_is_found(converted_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LatentSelfAttention._attend

    def unmasked(self: Any, *tensors: Any) -> Any:
        *others, mask, needs_weights = tensors
        seen = mask if mask is None or mask.shape[0] == 1 else mask[:1].expand_as(mask)  # the first row's for all
        return original(self, *others, seen, needs_weights)

    monkeypatch.setattr(LatentSelfAttention, "_attend", unmasked)
    with pytest.raises(VerificationError, match="the same greedy text in a batch with left padding as without a cache"):
        check_generation(converted_demo, PROMPT)


def test_the_demo_ends_with_an_error_where_they_differ(
    converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself, which takes longest, is planned by the command that the demo calls; its folder is another's."""
    plan = convert_command.main

    def convert(args: list[str], **settings: Any) -> None:
        plan(args=[*args, "--dry-run"], **settings)
        shutil.copytree(converted_demo, args[1])

    monkeypatch.setattr(convert_command, "main", convert)
    monkeypatch.setattr(LatentSelfAttention, "_update", lambda _self, _cache, c_kv, k_rope: (c_kv, k_rope))
    done = CliRunner().invoke(demo_command, ["--output", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert isinstance(done.exception, VerificationError), done.exception
    assert "KV cache" in done.output  # of the plan

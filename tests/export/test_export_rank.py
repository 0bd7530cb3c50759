"""export --rank: latents of a smaller rank without converting again, from whatever folder, at a price that is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_deepseek_v3 import convert

from xeco_convert.cli import main
from xeco_convert.errors import CheckpointError, OptionError
from xeco_convert.export import ExportOptions, export_checkpoint


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("portable"), "llama", rank=12, rope_dim=8)


@pytest.mark.parametrize("target", ["transformers", "llama.cpp", "mlx"])
def test_the_cache_is_smaller_and_the_stock_class_computes_what_was_exported(
    target: str, portable: Path, tmp_path: Path
) -> None:
    report = export_checkpoint(portable, tmp_path / "stock", ExportOptions(target=target, rank=8))
    assert (report.kv_numbers_before, report.kv_numbers_after) == (3 * (12 + 8), 3 * (8 + 8))
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["kv_lora_rank"] == 8
    assert report.comparison.logits_difference < 2e-4  # 3e-5 to 4e-5 observed
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens
    assert report.rank_kl is not None and report.rank_top1 is not None and report.norm_kl is None
    assert json.loads((tmp_path / "stock" / "xeco_export.json").read_text())["rank_kl"] == report.rank_kl


def test_the_price_grows_as_the_rank_falls(portable: Path, tmp_path: Path) -> None:
    prices = [
        export_checkpoint(portable, tmp_path / str(rank), ExportOptions(rank=rank)).rank_kl for rank in (11, 8, 3)
    ]
    assert 0 < prices[0] < prices[1] < prices[2]  # 0.014, 0.061 and 0.19 observed


def test_the_rank_that_the_model_has_changes_nothing(portable: Path, tmp_path: Path) -> None:
    same = export_checkpoint(portable, tmp_path / "same", ExportOptions(rank=12))
    export_checkpoint(portable, tmp_path / "plain")
    assert same.rank_kl is None and same.norm_kl is None
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("same", "plain")]
    assert weights[0] == weights[1]


def narrowed(portable: Path, folder: Path, rank: int) -> Path:
    """The same folder with the first layer at a smaller rank."""
    shutil.copytree(portable, folder)
    tensors, prefix = load_file(folder / "model.safetensors"), "model.layers.0.self_attn."
    rows = tensors[f"{prefix}kv_a_proj_with_mqa.weight"]
    tensors[f"{prefix}kv_a_proj_with_mqa.weight"] = torch.cat([rows[:rank], rows[12:]])
    tensors[f"{prefix}kv_b_proj.weight"] = tensors[f"{prefix}kv_b_proj.weight"][:, :rank].contiguous()
    tensors[f"{prefix}kv_a_layernorm.weight"] = tensors[f"{prefix}kv_a_layernorm.weight"][:rank].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["mla_layers"][0]["kv_lora_rank"] = rank
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_layers_of_smaller_ranks_are_padded_as_before(portable: Path, tmp_path: Path) -> None:
    folder = narrowed(portable, tmp_path / "narrowed", 5)
    report = export_checkpoint(folder, tmp_path / "stock", ExportOptions(rank=8))
    assert report.kv_lora_rank == 8 and report.kv_numbers_before == 5 + 12 + 12 + 3 * 8
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens
    ours, stock = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "stock"))
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(stock[name][:5].frexp().mantissa, ours[name][:5].frexp().mantissa)
    assert (
        not stock[name][5:8].any() and stock["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"][:8].any(dim=1).all()
    )


def test_folders_without_a_norm_and_with_factorised_queries_take_it_too(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", rank=12, rope_dim=8, portable=False, init="paper", q_rank=20)
    report = export_checkpoint(converted, tmp_path / "stock", ExportOptions(rank=10))
    assert report.rank_kl is not None and report.norm_kl is None
    assert report.comparison.greedy_agreement == report.comparison.greedy_tokens


def test_the_command_tells_the_price(portable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", str(portable), str(tmp_path / "stock"), "--rank", "8"])
    assert end.value.code in (0, None)
    assert "smaller rank: KL 0." in capsys.readouterr().out


def test_ranks_that_cannot_be_are_refused(portable: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--rank: expected at most 12 \(the largest kv_lora_rank .* found 13"):
        export_checkpoint(portable, tmp_path / "stock", ExportOptions(rank=13))
    with pytest.raises(OptionError, match="--rank: expected a whole number of at least 1, found 0"):
        ExportOptions(rank=0)
    with pytest.raises(OptionError, match=r"--rank: --target vllm takes latents of 256, 448 or 512 numbers, so zeros"):
        ExportOptions(rank=128, target="vllm")
    with pytest.raises(OptionError, match=r"--rank: --target vllm-cpu takes latents of 512 numbers"):
        ExportOptions(rank=256, target="vllm-cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [{"kv_lora_rank": "12"}, {"kv_lora_rank": None}, {"kv_lora_rank": -3}])
def test_entries_that_are_none_are_named_as_without_it(
    damage: dict[str, object], portable: Path, tmp_path: Path
) -> None:
    shutil.copytree(portable, tmp_path / "damaged")
    config = json.loads((portable / "config.json").read_text())
    config["mla_layers"][1] |= damage
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="kv_lora_rank"):
        export_checkpoint(tmp_path / "damaged", tmp_path / "stock", ExportOptions(rank=8))

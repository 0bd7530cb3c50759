"""What engines read of an export: transformers without this package, and the rules of llama.cpp's converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from builders import random_ids
from safetensors import safe_open
from test_deepseek_v3 import convert
from transformers import AutoModelForCausalLM

import xeco_convert
from xeco_convert.export import ExportOptions, export_checkpoint

_WITHOUT_THIS_PACKAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "stock_without_package.py"


def stock_alone(
    folder: Path, ids: torch.Tensor, work: Path, new_tokens: int, site: str | None = None
) -> dict[str, Any]:
    """What transformers gives for an export in a Python without site's .pth files, where an editable install is not found."""
    torch.save(ids, work / "ids.pt")
    # transformers and torch may lie apart: where another release of the first is put before the packages of an environment
    places = dict.fromkeys(str(Path(module.__file__ or "").parents[1]) for module in (transformers, torch))
    arguments = [site or os.pathsep.join(places), folder, work / "ids.pt", work / "out.pt", new_tokens]
    command = [sys.executable, "-I", "-S", str(_WITHOUT_THIS_PACKAGE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stderr
    return torch.load(work / "out.pt")


def greedy(folder: Path, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Our own greedy tokens behind the first 16 of `ids` [1, T]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(ids[:1, :16], attention_mask=torch.ones(1, 16), do_sample=False, **length)[0, 16:]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("portable"), "llama", rank=12, rope_dim=8)


def test_transformers_loads_it_where_this_package_is_not_installed(portable: Path, tmp_path: Path) -> None:
    export_checkpoint(portable, tmp_path / "stock")
    ids = random_ids(1, 24)
    found = stock_alone(tmp_path / "stock", ids, tmp_path, 40)
    ours = AutoModelForCausalLM.from_pretrained(portable, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], ours(ids).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(found["greedy"], greedy(portable, ids, 40))
    assert found["cache_bytes"] == found["cache_tokens"] * 3 * (12 + 8) * 4


def test_the_separate_python_refuses_to_run_where_this_package_is_found(portable: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="xeco_convert can be imported here"):
        stock_alone(portable, random_ids(1, 24), tmp_path, 1, site=str(_WITHOUT_THIS_PACKAGE.parents[1]))


def test_a_trained_model_gives_the_same_hundred_tokens_without_this_package(
    stories: Path, shared: Path, tmp_path: Path
) -> None:
    """stories260k at half the cache. 2e-5 was observed for the logits; benchmarks/bench_export.py does tinystories-gqa."""
    samples = json.loads((shared / "text" / "stories260k_samples.json").read_text(encoding="utf-8"))
    rows = samples["sequences"] if isinstance(samples, dict) else samples
    (tmp_path / "ids.json").write_text(json.dumps(rows[:8]), encoding="utf-8")
    calibration = {"calibration": str(tmp_path / "ids.json"), "calibration_tokens": 1024}
    xeco_convert.convert(stories, tmp_path / "out", rank=24, rope_dim=8, portable=True, **calibration)
    export_checkpoint(tmp_path / "out", tmp_path / "stock")
    assert not list((tmp_path / "stock").glob("*.py"))
    ids = torch.tensor(rows[80:82])
    found = stock_alone(tmp_path / "stock", ids, tmp_path, 100)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert float((found["logits"] - ours(ids).logits).abs().max()) < 1e-3
    assert torch.equal(found["greedy"], greedy(tmp_path / "out", ids, 100))
    assert found["cache_bytes"] == found["cache_tokens"] * 5 * (24 + 8) * 4


def test_tensor_names_and_shapes_are_those_that_llama_cpp_s_converter_maps(portable: Path, tmp_path: Path) -> None:
    """The converter splits kv_b_proj of every layer into k_b and v_b, and renames; the graph of deepseek2 needs these."""
    export_checkpoint(portable, tmp_path / "stock", ExportOptions(target="llama.cpp"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2]
    heads, widths = config["num_attention_heads"], config["qk_nope_head_dim"] + config["v_head_dim"]
    found = set()
    with safe_open(tmp_path / "stock" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            parts = [name]
            if name.endswith("kv_b_proj.weight"):
                assert shape == [heads * widths, config["kv_lora_rank"]]
                parts = [name.replace("kv_b_proj", part) for part in ("k_b_proj", "v_b_proj")]
            for part in parts:
                kind, mapped = names.get_type_and_name(part, try_suffixes=(".weight",)) or (None, None)
                assert kind in known, part
                found.add(mapped)
    layer = (
        "attn_norm",
        "attn_q",
        "attn_kv_a_mqa",
        "attn_kv_a_norm",
        "attn_k_b",
        "attn_v_b",
        "attn_output",
        "ffn_norm",
    )
    layer += ("ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{number}.{name}.weight" for number in range(3) for name in layer}
    assert found == expected | {"token_embd.weight", "output_norm.weight", "output.weight"}


def test_the_metadata_that_llama_cpp_needs_can_be_written_from_config_json(portable: Path, tmp_path: Path) -> None:
    """Through the public package, by the keys of deepseek2; q_lora_rank 0 says that there is no query latent."""
    export_checkpoint(portable, tmp_path / "stock", ExportOptions(target="llama.cpp"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["q_lora_rank"] == 0 and config["n_routed_experts"] >= 2 and config["n_group"] is None
    writer = gguf.GGUFWriter(tmp_path / "meta.gguf", "deepseek2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "meta.gguf").fields
    assert fields["deepseek2.attention.kv_lora_rank"].contents() == 12
    assert fields["deepseek2.leading_dense_block_count"].contents() == fields["deepseek2.block_count"].contents() == 3

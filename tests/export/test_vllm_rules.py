"""By which rules vLLM's transformers backend takes an attention module for MLA, checked on exports and on our own module.

vLLM is not installed here. The rules are those of its files models/transformers/fusers/mla.py and
transformers_utils/model_arch_config_convertor.py (commits 7479af4 and 00bb6f5 of vllm-project/vllm), in our own words: it
reads the model_type, follows data through the module, and parses the source of `forward`. Checked by value where it follows data.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepseek_v3 import convert
from torch import nn
from transformers import AutoModelForCausalLM

from xeco_convert.export import ExportOptions, export_checkpoint

# What vLLM's list of MLA architectures has of those that could stand in an export.
MLA_MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32")


def expansions(module: nn.Module) -> list[str]:
    """Methods that `forward` calls once as self.method(latent, key), that use kv_b_proj, and return nothing but pairs."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))):
        if not isinstance(node, ast.Call) or len(node.args) != 2 or node.keywords:
            continue
        called = node.func
        if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name) or called.value.id != "self":
            continue
        method = getattr(type(module), called.attr, None)
        if method is None or method.__code__.co_argcount != 3 or "kv_b_proj" not in method.__code__.co_names:
            continue
        body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        returned = [part.value for part in body if isinstance(part, ast.Return)]
        if returned and all(isinstance(value, ast.Tuple) and len(value.elts) == 2 for value in returned):
            found.append(called.attr)
    return found


def interface_calls(module: nn.Module) -> int:
    """How often `forward` looks an attention function up."""
    return inspect.getsource(type(module).forward).count("ALL_ATTENTION_FUNCTIONS")


@torch.no_grad()
def latent_norm_input(model: Any, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What kv_a_layernorm was given, and the projection of the hidden states that it should be the first part of."""
    given: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    hooks = [
        module.kv_a_layernorm.register_forward_hook(lambda _m, inputs, _o: given.append(inputs[0])),
        module.kv_a_proj_with_mqa.register_forward_hook(lambda _m, _i, output: made.append(output)),
    ]
    model(torch.arange(3, 12)[None])
    for hook in hooks:
        hook.remove()
    return given[0], made[0]


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_an_export_is_recognised(target: str, tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", rank=12, rope_dim=8)
    export_checkpoint(converted, tmp_path / "stock", ExportOptions(target=target))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] in MLA_MODEL_TYPES and config["kv_lora_rank"] is not None
    assert config["qk_rope_head_dim"] + config["kv_lora_rank"] == (20 if target == "transformers" else 320)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    module = model.model.layers[0].self_attn
    given, made = latent_norm_input(model, module)
    rank = module.kv_a_layernorm.weight.numel()
    assert rank != module.kv_a_proj_with_mqa.out_features  # by which the latent's norm is told from the queries'
    assert torch.equal(given, made[..., :rank])
    expected = given * torch.rsqrt(given.pow(2).mean(-1, keepdim=True) + module.kv_a_layernorm.variance_epsilon)
    torch.testing.assert_close(module.kv_a_layernorm(given), expected * module.kv_a_layernorm.weight)
    assert module.q_proj is not None and type(module.kv_b_proj) is nn.Linear
    assert expansions(module) == ["expand_kv"] and interface_calls(module) == 1


def test_our_own_module_is_not_and_docs_say_so(converted: Path) -> None:
    """Its model_type is not on vLLM's list, so the shape of the module does not come into it."""
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] not in MLA_MODEL_TYPES and "kv_lora_rank" not in config
    module = AutoModelForCausalLM.from_pretrained(converted).model.layers[0].self_attn
    assert expansions(module) == [] and interface_calls(module) == 0
    serving = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "list of MLA model types" in serving

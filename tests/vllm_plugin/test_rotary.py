"""Rotary frequencies of a converted layer in vLLM: those of transformers' tables, on the device that vLLM builds on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import ROPES, source_config
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert.errors import UnsupportedModelError
from xeco_convert.modeling import MlaLayer
from xeco_convert.vllm.rotary import layer_rotary

INDEX = (3, 0, 0)
LAYER = MlaLayer(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=8, rope_index=INDEX)
POSITIONS = torch.tensor([0, 1, 9, 15])


def config_of(variant: str, rope: str = "default") -> Any:
    values = source_config(variant, rope)
    return AutoConfig.for_model(**values)


@pytest.mark.parametrize("rope", ROPES)
def test_columns_are_rotated_as_in_the_source(rope: str) -> None:
    config = config_of("llama", rope)
    rotary = layer_rotary(config, "Llama", 0, LAYER, config.max_position_embeddings)
    assert rotary is not None
    model = AutoModelForCausalLM.from_config(config).model
    cos, sin = model.rotary_emb(torch.zeros(1), POSITIONS.unsqueeze(0))
    columns = [*INDEX, *INDEX]
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    expected = x * cos[0][:, columns].unsqueeze(1) + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin[0][
        :, columns
    ].unsqueeze(1)
    for rotated in rotary(POSITIONS, x, x):
        torch.testing.assert_close(rotated, expected)


def test_frequencies_lie_where_vllm_builds_the_model() -> None:
    with torch.device("meta"):
        rotary = layer_rotary(config_of("llama"), "Llama", 0, LAYER, 64)
    assert rotary is not None and rotary.frequencies.device.type == "meta"


def test_a_layer_without_rotation_has_no_rotary_embedding() -> None:
    still = MlaLayer(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=0, v_head_dim=8, rope_index=())
    assert layer_rotary(config_of("smollm3"), "SmolLM3", 1, still, 64) is None


def test_dynamic_frequencies_are_refused_beyond_the_length_that_changes_them() -> None:
    config = config_of("llama", "dynamic")
    with pytest.raises(UnsupportedModelError, match=f"--max-model-len {config.max_position_embeddings}"):
        layer_rotary(config, "Llama", 0, LAYER, config.max_position_embeddings + 1)

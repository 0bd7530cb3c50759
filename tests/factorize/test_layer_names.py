"""A layer's tensors go to their names and back without a change, for every kind of layer; what does not fit is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from builders import VARIANTS, source_attentions, source_model
from torch import Tensor

from xeco_convert.errors import CheckpointError
from xeco_convert.factorize import MlaAttention
from xeco_convert.factorize.exact import exact_factors, exact_shape
from xeco_convert.modeling import family_config_class, family_model_class
from xeco_convert.modeling.layer_xeco import FIELDS, MlaShape

BIASES = ((), ("q",), ("kv_a",), ("q", "kv_a", "kv_b", "o"), ("q", "k", "v", "o"))
ROPES = ((6, (0, 2, 1)), (6, None), (0, ()), (0, None))  # own columns, own frequencies, none


def kinds() -> list[MlaShape]:
    """Every combination of what a layer may have or not."""
    sizes = {"num_attention_heads": 2, "hidden_size": 16, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "v_head_dim": 3}
    norms = (None, "head", "all")
    choices = itertools.product((None, 7), (False, True), norms, norms, BIASES, ROPES)
    return [
        MlaShape(
            **sizes,
            q_lora_rank=q_rank,
            latent_norm=latent_norm,
            q_norm=q_norm,
            k_norm=k_norm,
            num_key_value_heads=0 if k_norm is None else 2,
            biases=biases,
            qk_rope_head_dim=rope_dim,
            rope_index=rope_index,
        )
        for q_rank, latent_norm, q_norm, k_norm, biases, (rope_dim, rope_index) in choices
        if (k_norm is None) != bool({"k", "v"} & set(biases)) or not biases
    ]


def random_tensors(shape: MlaShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in shape.tensors().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_every_combination_comes_back_bit_for_bit_in_its_order() -> None:
    for shape in kinds():
        tensors = random_tensors(shape)
        layer = MlaAttention.from_state_dict(tensors, shape, "layer 0")
        assert same(layer.state_dict(), tensors) and layer.rope_index == shape.rope_index
        assert len(layer.tensors()) == len(tensors)
    assert {name for shape in kinds() for name in shape.tensors()} == set(FIELDS)  # the combinations reach every name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layers_of_every_family_come_back_bit_for_bit(variant: str) -> None:
    for source in source_attentions(source_model(variant)):
        layer, shape = exact_factors(source), exact_shape(source)
        again = MlaAttention.from_state_dict(layer.state_dict(), shape, variant)
        assert again.tensors().keys() == layer.tensors().keys() and again.rope_index == layer.rope_index
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in layer.tensors().items())


def test_the_model_has_the_same_names_and_sizes() -> None:
    settings: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    for shape in kinds():
        if shape.rope_index is None and not shape.qk_rope_head_dim:
            continue  # no frequencies of no width
        config = family_config_class("Llama")(
            **settings, vocab_size=8, intermediate_size=8, num_hidden_layers=1, mla_layers=[shape.to_dict()]
        )
        with torch.device("meta"):
            attention = family_model_class("Llama", "Model")(config).layers[0].self_attn
        assert {name: tuple(tensor.shape) for name, tensor in attention.state_dict().items()} == shape.tensors()


def test_a_name_that_is_missing_unknown_or_of_another_size_is_refused() -> None:
    for shape in kinds():
        tensors = random_tensors(shape)
        for name in tensors:
            size = list(tensors[name].shape)
            others = {key: tensor for key, tensor in tensors.items() if key != name}
            with pytest.raises(CheckpointError, match=r"^layer 3\.") as error:
                MlaAttention.from_state_dict(others, shape, "layer 3")
            assert f"layer 3.{name}: expected {size} by the layer's widths in config.json, found none" in str(
                error.value
            )
            with pytest.raises(CheckpointError, match=r"expected \[.*found \["):
                MlaAttention.from_state_dict(others | {name: torch.zeros(99)}, shape, "layer 3")
        for name in {*FIELDS, "q_norm.bias", "k_proj.weight", "rotary_emb.inv_freq"} - set(tensors):
            with pytest.raises(CheckpointError) as error:
                MlaAttention.from_state_dict(tensors | {name: torch.zeros(2)}, shape, "layer 3")
            assert f"layer 3.{name}: expected none by the layer's widths in config.json, found [2]" in str(error.value)

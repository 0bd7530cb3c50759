"""The published initialisation through the unrepeated matrix equals the published method written out."""

import math
from itertools import pairwise

import pytest
import torch
from builders import random_attention
from formulas import mla_output, published_key_value_maps, published_output, repeated_matrix
from torch import Tensor

from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.joint_svd import joint_key_value_factors, paper_errors, paper_factors, paper_spectrum
from xeco_convert.modeling.layer_xeco import MlaShape

HEADS = [(4, 4), (4, 2), (4, 1), (6, 2)]


def shape_of(
    source: SourceAttention,
    rank: int,
    rope: int = 4,
    nope: int | None = None,
    q_rank: int | None = None,
    **fields: bool,
) -> MlaShape:
    biases = {"q": source.q_bias, "kv_a": source.k_bias, "kv_b": source.k_bias, "o": source.o_bias}
    return MlaShape(
        num_attention_heads=source.num_attention_heads,
        hidden_size=source.q_weight.shape[1],
        kv_lora_rank=rank,
        qk_nope_head_dim=source.head_dim - rope if nope is None else nope,
        qk_rope_head_dim=rope,
        v_head_dim=source.head_dim,
        q_lora_rank=q_rank,
        biases=tuple(name for name, bias in biases.items() if bias is not None),
        **fields,
    )


def inputs(num_tokens: int = 13) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def full_rank(source: SourceAttention) -> int:
    return min(2 * source.k_weight.shape[0], source.k_weight.shape[1])


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("rank", [1, 7, 16])
def test_joint_factors_are_those_of_the_repeated_matrix_up_to_sign(heads: int, groups: int, rank: int) -> None:
    source = random_attention(heads, groups)
    found = joint_key_value_factors(source, rank)
    down, key_up, value_up = published_key_value_maps(source, rank)
    left = torch.cat([key_up, value_up]).reshape(-1, rank)
    sign = (found.left * left).sum(0).sign()
    torch.testing.assert_close(found.left * sign, left, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.right * sign[:, None], down, rtol=1e-7, atol=1e-7)
    expected = torch.linalg.svdvals(repeated_matrix(source))[:rank]
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_the_spectrum_is_that_of_the_repeated_matrix_scaled(heads: int, groups: int) -> None:
    source = random_attention(heads, groups)
    values = paper_spectrum(source) * math.sqrt(heads / groups)
    assert values.shape == (full_rank(source),)
    expected = torch.linalg.svdvals(repeated_matrix(source))[: full_rank(source)]
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("bias", ["", "qkv", "qkvo"])
def test_factors_give_the_output_of_the_published_method(heads: int, groups: int, bias: str) -> None:
    source, x = random_attention(heads, groups, bias=bias), inputs()
    shape = shape_of(source, rank=10)
    found = mla_output(paper_factors(source, shape), shape, x, head_dim=8)
    expected = published_output(source, x, rank=10, rope_dim=4, nope_dim=4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rope", "nope", "q_rank"),
    [(2, 6, None), (8, 0, None), (4, 2, None), (4, 8, None), (4, 4, 9), (6, 1, 32), (2, 0, 1)],
)
def test_every_split_gives_the_output_of_the_published_method(rope: int, nope: int, q_rank: int | None) -> None:
    source, x = random_attention(bias="qkv"), inputs()
    shape = shape_of(source, rank=12, rope=rope, nope=nope, q_rank=q_rank)
    found = mla_output(paper_factors(source, shape), shape, x, head_dim=8)
    expected = published_output(source, x, rank=12, rope_dim=rope, nope_dim=nope, q_rank=q_rank)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q_rank", [None, 9])
@pytest.mark.parametrize("latent_norm", [False, True])
@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_factors_have_the_tensors_of_their_shape(q_rank: int | None, latent_norm: bool, bias: str) -> None:
    source = random_attention(bias=bias)
    shape = shape_of(source, 10, q_rank=q_rank, latent_norm=latent_norm)
    found = {name: tuple(tensor.shape) for name, tensor in paper_factors(source, shape).state_dict().items()}
    assert found == shape.tensors()


def test_the_rotary_key_is_the_mean_of_the_last_rows_of_the_groups() -> None:
    """In half-split order: the published pairs (0, 1), (2, 3) become (0, 2), (1, 3)."""
    source = random_attention(bias="k")
    rows = paper_factors(source, shape_of(source, 10)).kv_a_weight[10:]
    mean = source.k_weight.view(2, 8, 32)[:, 4:].mean(0)
    torch.testing.assert_close(rows, mean[[0, 2, 1, 3]])


def test_at_full_rank_only_the_rotary_rows_are_lost() -> None:
    source = random_attention()
    shape = shape_of(source, full_rank(source))
    factors = paper_factors(source, shape)
    maps = (factors.kv_b_weight @ factors.kv_a_weight[: shape.kv_lora_rank]).view(4, 12, 32)
    keys, values = (weight.view(2, 8, 32).repeat_interleave(2, dim=0) for weight in (source.k_weight, source.v_weight))
    torch.testing.assert_close(maps[:, :4], keys[:, :4])
    torch.testing.assert_close(maps[:, 4:], values)
    assert paper_errors(source, factors, shape).value < 1e-12


def test_the_error_of_the_values_falls_with_the_rank() -> None:
    source = random_attention()
    errors = []
    for rank in range(1, full_rank(source) + 1):
        shape = shape_of(source, rank)
        errors.append(paper_errors(source, paper_factors(source, shape), shape))
    joint = [error.value for error in errors]
    assert all(later < earlier for earlier, later in pairwise(joint))
    assert errors[-1].value < 1e-12 < errors[0].value < 1
    assert errors[-1].key < errors[0].key


@pytest.mark.parametrize(("rope", "nope"), [(4, 4), (4, 2), (8, 0), (2, 6), (2, 1)])
def test_errors_are_those_of_the_maps_row_by_row(rope: int, nope: int) -> None:
    source = random_attention(6, 2)
    shape = shape_of(source, 10, rope, nope)
    found = paper_errors(source, paper_factors(source, shape), shape)
    down, key_up, value_up = published_key_value_maps(source, 10)
    keys, values = repeated_matrix(source).view(2, 6, 8, 32)
    approximate = torch.zeros_like(keys)
    approximate[:, :nope] = (key_up @ down)[:, :nope]
    approximate[:, 8 - rope :] = source.k_weight.view(2, 8, 32)[:, 8 - rope :].mean(0)
    assert found.key == pytest.approx(float((approximate - keys).norm() / keys.norm()), rel=1e-9)
    assert found.value == pytest.approx(float((value_up @ down - values).norm() / values.norm()), rel=1e-9)


def test_the_weight_of_the_latent_norm_is_the_rms_of_the_latent() -> None:
    """Observed on normal inputs times the input norm's weight: with it the norm changes the scale by a percent or two."""
    source = random_attention()
    shape = shape_of(source, 10, latent_norm=True)
    factors = paper_factors(source, shape)
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latent = (x * source.input_norm_weight) @ factors.kv_a_weight[:10].T
    weight = factors.latent_norm_weight
    assert weight is not None and weight.shape == (10,)
    torch.testing.assert_close(weight, latent.square().mean().sqrt().expand(10), rtol=0.02, atol=0)


def test_queries_of_full_rank_are_the_queries() -> None:
    source = random_attention()
    shape, plain = shape_of(source, 10, q_rank=32), shape_of(source, 10)
    low, full = paper_factors(source, shape), paper_factors(source, plain)
    assert low.q_a_weight is not None and low.q_b_weight is not None and full.q_weight is not None
    torch.testing.assert_close(low.q_b_weight @ low.q_a_weight, full.q_weight)

"""The source written as MLA without approximation is the source, in float64, for every grouping and bias."""

import dataclasses

import pytest
import torch
from builders import random_attention
from formulas import mla_output, source_output

from xeco_convert.factorize.exact import exact_factors, exact_shape

HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (1, 1)]
BIASES = ["", "qkv", "qkvo", "q", "o"]


def random_inputs(num_tokens: int = 11, hidden: int = 32) -> torch.Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("bias", BIASES)
def test_exact_factors_give_the_output_of_the_source(heads: int, groups: int, bias: str) -> None:
    source = random_attention(heads, groups, bias=bias)
    shape, factors, x = exact_shape(source), exact_factors(source), random_inputs()
    torch.testing.assert_close(
        mla_output(factors, shape, x, head_dim=8), source_output(source, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("dim", "hidden"), [(2, 32), (12, 32), (16, 20)])
def test_exact_factors_do_not_need_heads_that_fill_the_hidden_size(dim: int, hidden: int) -> None:
    source = random_attention(4, 2, dim, hidden, bias="qkvo")
    x = random_inputs(hidden=hidden)
    found = mla_output(exact_factors(source), exact_shape(source), x, head_dim=dim)
    torch.testing.assert_close(found, source_output(source, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("bias", BIASES)
def test_factors_have_the_tensors_of_their_shape(heads: int, groups: int, bias: str) -> None:
    source = random_attention(heads, groups, bias=bias)
    found = {name: tuple(tensor.shape) for name, tensor in exact_factors(source).state_dict().items()}
    assert found == exact_shape(source).tensors()


def test_exact_factors_keep_the_dtype_and_the_numbers_of_the_source() -> None:
    source = random_attention(bias="qkv", dtype=torch.bfloat16)
    factors = exact_factors(source)
    assert {tensor.dtype for tensor in factors.state_dict().values()} == {torch.bfloat16}
    given = {float(number) for number in torch.cat([source.k_weight, source.v_weight]).flatten()}
    assert {float(number) for number in factors.kv_a_weight.flatten()} == given


def test_a_permuted_rotary_row_is_noticed() -> None:
    """The comparison above can fail: one exchanged pair of rows is far outside its tolerance."""
    source, x = random_attention(), random_inputs()
    factors = exact_factors(source)
    rows = factors.kv_a_weight.clone()
    rows[[-1, -2]] = rows[[-2, -1]]
    damaged = dataclasses.replace(factors, kv_a_weight=rows)
    difference = mla_output(damaged, exact_shape(source), x, head_dim=8) - source_output(source, x)
    assert difference.abs().max() > 1e-3


def test_heads_per_group_counts_queries_of_one_key() -> None:
    assert [random_attention(heads, groups).heads_per_group for heads, groups in HEADS] == [1, 2, 4, 3, 1]

"""Linear keys for normalised ones: the regression finds what is linear, and tells how much is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from torch import Tensor

from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.attention import source_projections
from xeco_convert.factorize.linear_keys import KeyRegression, LinearKeys


def source_with_norms(width: int, *, bias: str = "") -> SourceAttention:
    source = random_attention(heads=4, groups=2, dim=8, hidden=16, bias=bias)
    generator = torch.Generator().manual_seed(2)
    weight = 1 + 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    q_weight = weight if width == 8 else torch.cat([weight, weight])
    return dataclasses.replace(source, k_norm_weight=weight, q_norm_weight=q_weight)


def inputs(count: int, *, seed: int = 0, hidden: int = 16) -> Tensor:
    return torch.randn(count, 20, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regressed(source: SourceAttention, x: Tensor, held_out: Tensor, counts: Tensor | None = None) -> LinearKeys:
    regression = KeyRegression(source)
    regression.add(x, torch.ones(x.shape[:2], dtype=torch.bool) if counts is None else counts)
    regression.add(held_out, torch.ones(held_out.shape[:2], dtype=torch.bool), held_out=True)
    return regression.result()


@pytest.mark.parametrize("width", [8, 16])  # each head by itself, all rows together
@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_the_error_is_that_of_the_keys_on_other_tokens(width: int, bias: str) -> None:
    source = source_with_norms(width, bias=bias)
    found = regressed(source, inputs(40), inputs(8, seed=1))
    assert found.source.k_norm_weight is None and (found.source.k_bias is None) == (bias == "")
    x = inputs(200, seed=3)
    keys, linear = source_projections(source, x)[1], source_projections(found.source, x)[1]
    error = float((linear - keys).square().sum() / keys.square().sum())
    assert error == pytest.approx(found.error, rel=0.1)
    assert 0.001 < found.error <= found.prior_error < 0.3


def test_keys_of_constant_rms_are_linear() -> None:
    source = source_with_norms(8)
    x = inputs(20)
    # inputs of constant norm through orthogonal projections of each group
    rows = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    weight = torch.zeros(16, 16, dtype=torch.float64)
    weight[:8, :8], weight[8:, 8:] = rows, rows
    halves = x.unflatten(-1, (2, 8))
    x = (halves / halves.norm(dim=-1, keepdim=True)).flatten(-2)
    source = dataclasses.replace(source, k_weight=weight, norm_eps=0.0)
    found = regressed(source, x[:16], x[16:])
    assert found.error < 1e-10 and found.prior_error < 1e-10
    torch.testing.assert_close(source_projections(found.source, x)[1], source_projections(source, x)[1])


def test_tokens_that_do_not_count_take_no_part() -> None:
    source, x = source_with_norms(8), inputs(20)
    broken = x.clone()
    broken[:, 11:] = 1e3
    counts = torch.zeros(x.shape[:2], dtype=torch.bool)
    counts[:, :11] = True
    found = regressed(source, broken, inputs(4, seed=1), counts)
    expected = regressed(source, x[:, :11], inputs(4, seed=1))
    torch.testing.assert_close(found.source.k_weight, expected.source.k_weight)
    assert found.error == pytest.approx(expected.error)


def test_few_tokens_fall_back_to_the_projection_with_one_scale() -> None:
    """Fewer tokens than inputs have directions: plain least squares would fit them exactly, and other tokens badly."""
    source = source_with_norms(8)
    found = regressed(source, inputs(1)[:, :9], inputs(8, seed=1))
    assert found.error < 1.5 * found.prior_error

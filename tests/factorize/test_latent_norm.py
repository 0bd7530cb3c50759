"""The basis that a latent's norm changes least: free where the norm is not there, steady where it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs, output_error

from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis


def latents(count: int = 4000, rank: int = 8, *, seed: int = 0) -> torch.Tensor:
    """A constant direction hidden in large variation, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    free[:, 0] = 1 + 0.05 * free[:, 0]
    mixing = torch.randn(rank, rank, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return free @ mixing


def test_a_hidden_constant_direction_makes_the_norm_steady() -> None:
    basis = steady_basis(latents())
    assert basis.before > 0.05 and basis.variation < 0.2 * basis.before
    turned = latents(seed=3) @ basis.matrix.T
    rms = turned.square().mean(dim=1).sqrt()
    assert float(rms.mean()) == pytest.approx(1, abs=0.02)
    assert float((rms - 1).square().mean()) < 2 * basis.variation


def test_directions_without_tokens_do_not_break_it() -> None:
    rows = latents()
    rows[:, 3:] = 0
    assert torch.isfinite(steady_basis(rows).matrix).all()


@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_without_the_norm_the_layer_is_the_same_and_with_it_nearly(bias: str) -> None:
    source, x = random_attention(bias=bias), gaussian_inputs(windows=40)
    context = context_of(source)
    layer = calibrated(source, x, context)
    plain = layer.factors(16, 8)
    normed = layer.factors(16, 8, latent_norm=True)
    linear = torch.nn.functional.linear(x, normed.kv_a_weight[:16], None if not bias else normed.kv_a_bias[:16])
    steady = with_steady_basis(normed, steady_basis(linear.flatten(0, 1)))
    free = dataclasses.replace(steady, latent_norm_weight=None)
    expected = mla_output(plain, 4, x, context)
    torch.testing.assert_close(mla_output(free, 4, x, context), expected, rtol=1e-6, atol=1e-8)
    errors = [output_error(source, mla, x, context) for mla in (plain, steady, normed)]
    assert errors[0] <= errors[1] < errors[2]

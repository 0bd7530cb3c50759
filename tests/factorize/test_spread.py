"""Latents turned for codes: the same function but for what rounding takes, and rows whose numbers are alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs

from xeco_convert.factorize import MlaAttention
from xeco_convert.factorize.attention import mla_compressed, mla_output
from xeco_convert.factorize.balance import balance_for_storage, balance_scales
from xeco_convert.factorize.spread import allotted_planes, spreading_map, with_codes
from xeco_convert.ops.packed_rows import as_cached, classes_of


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 88, 512])
def test_the_map_is_orthogonal_and_has_no_large_entry(rank: int) -> None:
    turn = spreading_map(rank)
    torch.testing.assert_close(turn @ turn.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(turn.abs().max()) <= (2 / rank) ** 0.5 + 1e-12


@pytest.mark.parametrize("bias", ["", "qkvo"])
@pytest.mark.parametrize("latent_norm", [False, True])
def test_turning_changes_no_output(bias: str, latent_norm: bool) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    mla = calibrated(source, x, context).factors(10, 4, latent_norm=latent_norm)
    turned = dataclasses.replace(with_codes(mla, 4, 4, 8), latent_bits=16, rope_bits=16)
    assert not torch.allclose(turned.kv_b_weight, mla.kv_b_weight)
    torch.testing.assert_close(mla_output(turned, 4, x, context), mla_output(mla, 4, x, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_turning_runs_of_as_many_bits_changes_no_output(bias: str) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    layer = calibrated(source, x, context)
    mla = layer.factors(16, 8)
    turned = with_codes(mla, 4, 3, 6, layer.energies(16, 8))
    assert isinstance(turned.latent_bits, tuple) and sum(turned.latent_bits) == 3 * 16 and turned.rope_bits == 6
    plain = dataclasses.replace(turned, latent_bits=16, rope_bits=16)
    torch.testing.assert_close(mla_output(plain, 4, x, context), mla_output(mla, 4, x, context), rtol=1e-9, atol=1e-9)


def lost_of_normal_rows(energies: torch.Tensor, planes: tuple[int, ...]) -> float:
    """What rows with these energies lose in these planes, scaled and turned as `with_codes` does it."""
    rows = torch.randn(500, len(energies), generator=torch.Generator().manual_seed(0)).double() * energies.sqrt()
    lost = 0.0
    for bits, first, end in classes_of(planes):
        scales = energies[first:end] ** -0.25
        turn = spreading_map(end - first)
        turned = (rows[:, first:end] * scales) @ turn.T
        found = as_cached(turned, (end - first,) * bits) @ turn / scales
        lost += float((found - rows[:, first:end]).square().sum())
    return lost / 500


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("falls", [0.0, 1.0, 2.0])
def test_bits_are_shared_out_as_their_errors_say(bits: int, falls: float) -> None:
    """No worse than all alike, and than what moves a byte from one plane to another."""
    energies = torch.arange(1, 97).double() ** -falls
    planes = allotted_planes(energies, bits)
    assert sum(planes) == bits * 96 and all(reached % 8 == 0 for reached in planes)
    assert list(planes) == sorted(planes, reverse=True) and planes[0] == 96
    best = lost_of_normal_rows(energies, planes)
    assert best <= lost_of_normal_rows(energies, (96,) * bits) * 1.01
    if falls == 0:
        assert planes == (96,) * bits
    if falls == 2:
        assert best < 0.5 * lost_of_normal_rows(energies, (96,) * bits)
    padded = [*planes, *(0,) * (7 - len(planes))]
    for source, target in itertools.permutations(range(1, 7), 2):
        moved = list(padded)
        moved[source] -= 8
        moved[target] += 8
        if min(moved) >= 0 and moved == sorted(moved, reverse=True):
            # runs of few numbers lose less than the formula says: their largest sets the scale
            assert best <= lost_of_normal_rows(energies, tuple(x for x in moved if x)) * 1.15


def test_sixteen_bits_leave_a_layer_as_it_is() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = calibrated(source, x, context_of(source)).factors(10, 4)
    assert with_codes(mla, 4, 16, 16) == mla


@pytest.mark.parametrize("balance", [balance_for_storage, balance_scales])
def test_codes_lose_less_of_turned_latents_before_and_after_balancing(
    balance: Callable[[MlaAttention, int], MlaAttention],
) -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=32)
    context = context_of(source)
    mla = calibrated(source, x, context).factors(16, 4)
    expected = mla_output(mla, 4, x, context)

    def lost(layer: MlaAttention) -> float:
        return float((mla_output(layer, 4, x, context) - expected).square().sum() / expected.square().sum())

    plain, turned = dataclasses.replace(mla, latent_bits=4), with_codes(mla, 4, 4, 16)
    assert lost(with_codes(mla, 4, 8, 8)) < lost(turned) / 50
    assert lost(turned) < 0.8 * lost(plain)
    balanced = balance(turned, 4)
    assert lost(balanced) < 1.1 * lost(turned)


@pytest.mark.parametrize(("latent_bits", "rope_bits"), [(4, 8), (3, 6), (16, 4)])
def test_weights_are_trained_on_what_the_codes_give_back(latent_bits: int, rope_bits: int) -> None:
    """With gradients the output is that of the codes too, and its gradient that of the layer without them, at those values."""
    source, x = random_attention(4, 2), gaussian_inputs()
    context = context_of(source)
    layer = calibrated(source, x, context)
    mla = with_codes(layer.factors(16, 8), 4, latent_bits, rope_bits, layer.energies(16, 8))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in mla.tensors().items()}
    found = mla_output(mla.with_tensors(leaves), 4, x, context)
    expected = mla_output(mla, 4, x, context)
    wide = mla_output(dataclasses.replace(mla, latent_bits=16, rope_bits=16), 4, x, context)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)
    assert float((expected - wide).norm() / wide.norm()) > 1e-4
    gradients = torch.autograd.grad(found.square().sum(), list(leaves.values()))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_turned_rows_are_alike() -> None:
    """The largest number of a token beside the rms of its latent: what decides on the scale of its codes."""
    source, x = random_attention(4, 2), gaussian_inputs(windows=32)
    context = context_of(source)
    mla = calibrated(source, x, context).factors(16, 4)
    peaks = []
    for layer in (mla, with_codes(mla, 4, 4, 8)):
        latents = mla_compressed(layer, x, context)[0].flatten(0, 1)
        peaks.append(float((latents.abs().amax(dim=1) / latents.square().mean(dim=1).sqrt()).mean()))
    assert peaks[1] < 0.85 * peaks[0]


def test_a_norm_whose_weight_differs_is_refused() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = calibrated(source, x, context_of(source)).factors(10, 4, latent_norm=True)
    mla = dataclasses.replace(mla, latent_norm_weight=torch.arange(1.0, 11.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="before a norm whose weight differs"):
        with_codes(mla, 4, 4, 8)

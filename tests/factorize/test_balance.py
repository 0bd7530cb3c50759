"""Free scales of a layer: balancing changes no function, and leaves weights that face each other at one scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs
from torch import Tensor

from xeco_convert.factorize import MlaAttention
from xeco_convert.factorize.attention import mla_output, split_up_projection
from xeco_convert.factorize.balance import balance_for_storage, balance_scales


@pytest.mark.parametrize("bias", ["", "qkvo"])
@pytest.mark.parametrize("kv_b_bias", [False, True])
@pytest.mark.parametrize("q_rank", [None, 10])
@pytest.mark.parametrize("latent_norm", [False, True])
def test_balancing_changes_no_output(bias: str, kv_b_bias: bool, q_rank: int | None, latent_norm: bool) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    layer = calibrated(source, x, context, with_inputs=True)
    mla = layer.factors(9, 4, q_lora_rank=q_rank, latent_norm=latent_norm)
    if kv_b_bias:  # keys' part moves all scores of a query alike; values' part is added
        generator = torch.Generator().manual_seed(2)
        mla = dataclasses.replace(mla, kv_b_bias=torch.randn(64, generator=generator, dtype=torch.float64))
    balanced = balance_scales(mla, 4)
    torch.testing.assert_close(
        mla_output(balanced, 4, x, context), mla_output(mla, 4, x, context), rtol=1e-9, atol=1e-9
    )
    assert balanced.rope_index == mla.rope_index and balanced.tensors().keys() == mla.tensors().keys()
    if latent_norm:
        torch.testing.assert_close(balanced.kv_a_weight[:9], mla.kv_a_weight[:9])


def test_factors_that_face_each_other_get_one_scale() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = balance_scales(calibrated(source, x, context_of(source)).factors(9, 4), 4)
    assert mla.q_weight is not None
    w_uk, w_uv = split_up_projection(mla, 4)
    queries = mla.q_weight.view(4, 12, 32)
    for head in range(4):
        torch.testing.assert_close(w_uk[head].square().mean(), queries[head, :8].square().mean())
        torch.testing.assert_close(w_uv[head].square().mean(), mla.o_weight.view(32, 4, 8)[:, head].square().mean())
    for pair in range(2):
        rows = mla.kv_a_weight[[9 + pair, 11 + pair]]
        torch.testing.assert_close(rows.square().mean(), queries[:, [8 + pair, 10 + pair]].square().mean())


def test_zero_weights_stay_finite() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = calibrated(source, x, context_of(source)).factors(9, 4)
    empty = mla.with_tensors({"o_weight": torch.zeros_like(mla.o_weight), "q_weight": torch.zeros_like(mla.q_weight)})  # type: ignore[arg-type]
    assert all(bool(tensor.isfinite().all()) for tensor in balance_scales(empty, 4).tensors().values())


def lopsided(mla: MlaAttention, factor: float) -> MlaAttention:
    """The same function with every free scale off by about `factor`, one way or the other."""
    generator = torch.Generator().manual_seed(3)

    def scales(count: int) -> Tensor:
        return factor ** torch.randn(count, generator=generator, dtype=torch.float64).clamp(-2, 2)

    rank, rope = mla.kv_b_weight.shape[1], mla.qk_rope_head_dim
    pairs, keys = scales(rope // 2).repeat(2), scales(32)
    query = torch.cat([1 / keys.view(4, 8), (1 / pairs).expand(4, -1)], dim=1).flatten()
    name = "q_weight" if mla.q_head_weight is None else "q_head_weight"
    up = torch.cat([keys.view(4, 8), torch.ones(4, 8)], dim=1).flatten()
    changed = {
        "kv_a_weight": mla.kv_a_weight * torch.cat([torch.ones(rank), pairs])[:, None],
        "kv_b_weight": mla.kv_b_weight * up[:, None],
        name: getattr(mla, name) * query[:, None],
    }
    for bias, scale in (("kv_a_bias", torch.cat([torch.ones(rank), pairs])), ("kv_b_bias", up), ("q_bias", query)):
        if getattr(mla, bias) is not None and not (bias == "q_bias" and mla.q_head_weight is not None):
            changed[bias] = getattr(mla, bias) * scale
    return mla.with_tensors(changed)


def with_query_norm(mla: MlaAttention) -> MlaAttention:
    """The same widths with queries that are normalised before each head's map."""
    generator = torch.Generator().manual_seed(4)
    maps = torch.randn(4 * 12, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(4 * 8, 32, generator=generator, dtype=torch.float64)
    norm = torch.ones(8, dtype=torch.float64)
    bias = None if mla.q_bias is None else mla.q_bias[:32]
    return dataclasses.replace(mla, q_weight=queries, q_head_weight=maps, q_norm_weight=norm, q_bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", ["", "qkvo"])
@pytest.mark.parametrize("queries", ["whole", "factorised", "normed"])
@pytest.mark.parametrize("latent_norm", [False, True])
def test_balancing_for_storage_changes_no_bit_of_the_output(
    dtype: torch.dtype, bias: str, queries: str, latent_norm: bool
) -> None:
    q_rank = 10 if queries == "factorised" else None
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    mla = calibrated(source, x, context, with_inputs=True).factors(9, 4, q_lora_rank=q_rank, latent_norm=latent_norm)
    mla = with_query_norm(mla) if queries == "normed" else mla
    mla = (mla if q_rank else lopsided(mla, 10.0)).to(dtype)
    balanced = balance_for_storage(mla, 4)
    assert balanced.tensors().keys() == mla.tensors().keys() and balanced.rope_index == mla.rope_index
    assert any(not torch.equal(one, mla.tensors()[name]) for name, one in balanced.tensors().items())
    x = x.to(dtype)
    assert torch.equal(mla_output(balanced, 4, x, context), mla_output(mla, 4, x, context))
    for name, tensor in balanced.tensors().items():  # mantissas stay: any dtype rounds them alike
        assert torch.equal(tensor.frexp().mantissa, mla.tensors()[name].frexp().mantissa)


def test_rows_are_stored_at_the_scale_of_what_they_face() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = lopsided(calibrated(source, x, context_of(source)).factors(9, 4), 1000.0)
    stored = balance_for_storage(mla, 4)
    assert mla.q_weight is not None and stored.q_weight is not None
    assert float(mla.q_weight.abs().max()) > 1e4
    w_uk, w_uv = split_up_projection(stored, 4)
    queries, outputs = stored.q_weight.view(4, 12, 32), stored.o_weight.view(32, 4, 8)
    faced = [
        (w_uk.square().mean(-1), queries[:, :8].square().mean(-1)),
        (w_uv.square().mean(-1), outputs.square().mean(0)),
        (
            stored.kv_a_weight[9:].unflatten(0, (2, 2)).square().mean((0, 2)),
            queries[:, 8:].unflatten(1, (2, 2)).square().mean((0, 1, 3)),
        ),
    ]
    for one, other in faced:  # the nearest power of two: within a factor of two of each other
        assert bool(((one / other).sqrt().log2().abs() <= 1.0001).all())


def test_what_faces_nothing_keeps_its_scale() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    mla = calibrated(source, x, context_of(source)).factors(9, 4)
    assert mla.q_weight is not None
    empty = mla.with_tensors({"o_weight": torch.zeros_like(mla.o_weight), "q_weight": torch.zeros_like(mla.q_weight)})
    stored = balance_for_storage(empty, 4)
    assert all(bool(tensor.isfinite().all()) for tensor in stored.tensors().values())
    assert torch.equal(stored.kv_a_weight[9:], mla.kv_a_weight[9:])

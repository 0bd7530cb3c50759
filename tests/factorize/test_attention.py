"""Attention of whole windows: float32 runs on the compiled kernels where they are built, float64 in plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs

from xeco_convert.factorize import attention
from xeco_convert.factorize.attention import AttentionContext, mla_output
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.ops.fused import kernel_obstacle


def in_float32(mla: MlaAttention, context: AttentionContext) -> tuple[MlaAttention, AttentionContext]:
    tables = {"cos": context.cos.float(), "sin": context.sin.float()}
    return mla.to(torch.float32), dataclasses.replace(context, **tables)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_float32_equals_float64_with_its_gradients(window: int | None, softcap: float | None) -> None:
    source, x = random_attention(bias="qkvo"), gaussian_inputs(windows=3, length=70)
    context = dataclasses.replace(context_of(source, 70, window=window), logit_softcap=softcap)
    mla = calibrated(source, x, context_of(source, 70)).factors(12, 8)
    results = []
    for layer, given, inputs in ((mla, context, x), (*in_float32(mla, context), x.float())):
        weights = {name: tensor.clone().requires_grad_() for name, tensor in layer.tensors().items()}
        output = mla_output(layer.with_tensors(weights), source.num_attention_heads, inputs, given)
        gradients = torch.autograd.grad(output.square().mean(), list(weights.values()))
        results.append((output, *gradients))
    for exact, found in zip(*([tensor.detach() for tensor in result] for result in results), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("served", [True, False])
def test_the_kernels_are_taken_where_they_serve(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if served and kernel_obstacle("cpu", torch.float32) is not None:
        pytest.skip("the extension is not built here")
    if not served:
        monkeypatch.setattr(attention, "kernel_obstacle", lambda device, dtype: "none here")
    calls, original = [], attention.fused_attention
    monkeypatch.setattr(
        attention, "fused_attention", lambda *given, **named: calls.append(1) or original(*given, **named)
    )
    source, x = random_attention(), gaussian_inputs()
    mla, context = in_float32(calibrated(source, x, context_of(source)).factors(8, 4), context_of(source))
    mla_output(mla, source.num_attention_heads, x.float(), context)
    mla_output(mla, source.num_attention_heads, x.float(), dataclasses.replace(context, logit_softcap=3.0))
    assert len(calls) == served

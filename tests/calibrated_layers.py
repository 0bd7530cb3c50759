"""One attention layer and its calibration in float64: inputs, rotary tables, masks, statistics, closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.attention import AttentionContext, mla_output, source_probabilities, source_projections
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.factorize.statistics import LayerStatistics, StatisticsAccumulator

THETA = 100.0


def context_of(
    source: SourceAttention, length: int = 12, *, table_scale: float = 1.0, window: int | None = None
) -> AttentionContext:
    """Half-split tables of base THETA, scaled as yarn does, and a causal mask, with a sliding window if one is given."""
    half = source.head_dim // 2
    turn = torch.arange(length, dtype=torch.float64)[:, None] * THETA ** (-torch.arange(half).double() / half)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(diagonal=1 - window)
    return AttentionContext(
        cos=table_scale * turn.cos().repeat(1, 2)[None],
        sin=table_scale * turn.sin().repeat(1, 2)[None],
        mask=visible[None, None],
        softmax_scale=source.head_dim**-0.5,
    )


def gaussian_inputs(
    hidden: int = 32, *, windows: int = 8, length: int = 12, seed: int = 1, mean: float = 0.3
) -> Tensor:
    """Correlated normal inputs [W, T, X]; the mixing depends on hidden alone, so that seeds draw from one distribution."""
    mixing = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / hidden**0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(windows, length, hidden, generator=generator, dtype=torch.float64) @ mixing + mean


def collected(
    source: SourceAttention,
    x: Tensor,
    context: AttentionContext,
    counts: Tensor | None = None,
    *,
    with_inputs: bool = False,
) -> LayerStatistics:
    accumulator = StatisticsAccumulator(source, context, with_inputs=with_inputs)
    accumulator.add(x, torch.ones(x.shape[:2], dtype=torch.bool) if counts is None else counts)
    return accumulator.result()


def calibrated(
    source: SourceAttention, x: Tensor, context: AttentionContext, *, with_inputs: bool = False
) -> CalibratedLayer:
    return CalibratedLayer(source, collected(source, x, context, with_inputs=with_inputs), context.softmax_scale)


def source_output(source: SourceAttention, x_WTX: Tensor, context: AttentionContext) -> Tensor:
    """Output of the source's attention [W, T, X], o_proj included, from the formula."""
    queries, keys, values = source_projections(source, x_WTX)
    weights = source_probabilities(queries, keys, context)
    shared = values.repeat_interleave(source.heads_per_group, dim=2)
    out = torch.einsum("whts,wshd->wthd", weights, shared)
    return functional.linear(out.flatten(2), source.o_weight, source.o_bias)


def output_error(source: SourceAttention, mla: MlaAttention, x: Tensor, context: AttentionContext) -> float:
    """Relative squared error of the attention's output."""
    target = source_output(source, x, context)
    found = mla_output(mla, source.num_attention_heads, x, context)
    return float((found - target).square().sum() / target.square().sum())

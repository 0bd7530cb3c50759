"""Weights of a converted model in the layout of stock DeepSeek-V3: interleaved rotary rows, folded scales, zeros as padding.

Letters: H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank, X hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from xeco_convert.checkpoint import TensorHeader
from xeco_convert.export.formats.deepseek_v3.layout import ExportLayout

Read = Callable[[str], Tensor]


def stock_headers(layout: ExportLayout, dtype: str) -> list[TensorHeader]:
    """Every tensor of the exported checkpoint, in the order of the layers."""
    values = layout.config
    hidden, inner, heads = values["hidden_size"], values["intermediate_size"], layout.geometry.num_attention_heads
    widths, rank = layout.heads, layout.rank
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (values["vocab_size"], hidden)}
    for layer in range(layout.geometry.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"{attention}q_proj.weight": (heads * (widths.nope + widths.rope), hidden),
            f"{attention}kv_a_proj_with_mqa.weight": (rank + widths.rope, hidden),
            f"{attention}kv_a_layernorm.weight": (rank,),
            f"{attention}kv_b_proj.weight": (heads * (widths.nope + widths.v), rank),
            f"{attention}o_proj.weight": (hidden, heads * widths.v),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
            f"{mlp}gate_proj.weight": (inner, hidden),
            f"{mlp}up_proj.weight": (inner, hidden),
            f"{mlp}down_proj.weight": (hidden, inner),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (values["vocab_size"], hidden)}
    return [TensorHeader(name=name, dtype=dtype, shape=shape) for name, shape in shapes.items()]


def stock_tensors(
    layout: ExportLayout, read: Read, norm_weight: Callable[[int], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors by name, one layer in memory at a time, in float32. `norm_weight(layer)`: of the latent norm [R]."""
    values = layout.config
    family = layout.family
    residual = float(values.get(family.residual_scale) or 1.0)
    embedding = read(family.embedding)
    yield "model.embed_tokens.weight", embedding * float(values.get(family.embedding_scale) or 1.0)
    head = embedding if layout.head_is_embedding else read(family.output_head)
    yield "lm_head.weight", head / family.logits_scale(values)
    del embedding
    for layer in range(layout.geometry.num_hidden_layers):
        source = family.layers.format(layer=layer)
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield f"{prefix}{name}", read(f"{source}{name}")
        for name, tensor in _mlp(layout, read, source, residual):
            yield f"{prefix}mlp.{name}.weight", tensor
        for name, tensor in _attention(layout, read, layer, norm_weight(layer), residual):
            yield f"{prefix}self_attn.{name}.weight", tensor
    yield "model.norm.weight", read(f"{family.final_norm}weight")


def _mlp(layout: ExportLayout, read: Read, source: str, residual: float) -> Iterator[tuple[str, Tensor]]:
    if layout.fused_mlp:  # Phi: one matrix, gate first
        gate, up = read(f"{source}mlp.gate_up_proj.weight").chunk(2)
    else:
        gate, up = read(f"{source}mlp.gate_proj.weight"), read(f"{source}mlp.up_proj.weight")
    yield "gate_proj", gate
    yield "up_proj", up
    yield "down_proj", read(f"{source}mlp.down_proj.weight") * residual


def _attention(
    layout: ExportLayout, read: Read, layer: int, norm_weight: Tensor, residual: float
) -> Iterator[tuple[str, Tensor]]:
    module, widths, heads = layout.family.module_name(layer), layout.layers[layer], layout.geometry.num_attention_heads
    nope, rank = widths.qk_nope_head_dim, widths.kv_lora_rank
    if widths.q_lora_rank is None:
        queries = read(f"{module}.q_proj.weight")
    else:  # a stock q_a_proj has a norm behind it, which this one has not
        queries = read(f"{module}.q_b_proj.weight") @ read(f"{module}.q_a_proj.weight")
    q_HQX = queries.unflatten(0, (heads, -1)) * layout.query_scale
    rows = torch.cat([_padded(q_HQX[:, :nope], 1, layout.heads.nope), _in_slots(q_HQX[:, nope:], layout, layer)], dim=1)
    yield "q_proj", rows.flatten(0, 1)
    latent, rope = read(f"{module}.kv_a_proj_with_mqa.weight").split([rank, widths.qk_rope_head_dim])
    share = rank / layout.rank
    latent = _padded(latent * _latent_scale(layout, share), 0, layout.rank)
    yield "kv_a_proj_with_mqa", torch.cat([latent, _in_slots(rope[None], layout, layer)[0]])
    yield "kv_a_layernorm", _padded(norm_weight * math.sqrt(share), 0, layout.rank)
    up_HUR = _padded(read(f"{module}.kv_b_proj.weight").unflatten(0, (heads, -1)), 2, layout.rank)
    up_HUR = torch.cat(
        [_padded(up_HUR[:, :nope], 1, layout.heads.nope), _padded(up_HUR[:, nope:], 1, layout.heads.v)], dim=1
    )
    yield "kv_b_proj", up_HUR.flatten(0, 1)
    o_XHV = read(f"{module}.o_proj.weight").unflatten(1, (heads, -1)) * residual
    yield "o_proj", _padded(o_XHV, 2, layout.heads.v).flatten(1)


def _latent_scale(layout: ExportLayout, share: float) -> float:
    """What latent rows are multiplied by, so that the norm's eps acts on them as in our model, where eps and, by padding, the
    mean square differ. The nearest power of two, which rounds no stored weight: eps is then off by a factor of 2 at most, at
    1e-6 to 1e-5 of a mean square of about 1."""
    exact = math.sqrt(layout.norm_eps / layout.family.norm_eps(layout.config) / share)
    return float(2.0 ** round(math.log2(exact)))


def _in_slots(rows_HPX: Tensor, layout: ExportLayout, layer: int) -> Tensor:
    """Half-split rotary rows [H, P, X] as interleaved ones [H, P', X], each pair in the slot of its frequency, others zero."""
    slots = rows_HPX.new_zeros(rows_HPX.shape[0], layout.rotary.slots, 2, rows_HPX.shape[2])
    first, second = rows_HPX.unflatten(1, (2, -1)).unbind(1) if rows_HPX.shape[1] else (rows_HPX, rows_HPX)
    for pair, frequency in enumerate(layout.frequencies(layer)):
        slot = layout.rotary.slot(frequency)
        slots[:, slot, 0], slots[:, slot, 1] = first[:, pair], second[:, pair]
    return slots.flatten(1, 2)


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind a dimension, up to `size`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if shape[dim] else tensor

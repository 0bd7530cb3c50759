"""The attention weights of a source layer as the factorisations take them: separate projections, rotary pairs first."""

from __future__ import annotations

import torch
from torch import Tensor

from xeco_convert.checkpoint import TensorReader
from xeco_convert.factorize import SourceAttention
from xeco_convert.families import AttentionGeometry, FamilySpec
from xeco_convert.source import SourceModel


def read_attention(source: SourceModel, reader: TensorReader, layer: int, device: torch.device) -> SourceAttention:
    """Attention weights of a source layer, float32 on `device`: separate projections, rotary pairs first in each half."""
    family, geometry, rotary_dim = source.family, source.geometry, source.kinds[layer].rotary_dim

    def read(name: str) -> Tensor | None:
        if name not in source.index.headers:
            return None
        return reader.read(name, dtype=torch.float32, device=device)

    stored = {
        f"{which}_{part}": read(f"{source.projection(which, layer)}.{part}")
        for which in family.attention
        for part in ("weight", "bias")
    }
    weights = _separated(stored, family, geometry)
    for which in ("q", "k"):
        norm = stored.get(f"{which}_norm_weight")
        weights[f"{which}_norm_weight"] = None if norm is None else norm + family.norm_offset
    pairs = rotary_dim // 2
    if 0 < pairs < geometry.head_dim // 2:
        weights = {
            name: rotary_pairs_first(tensor, geometry.head_dim, pairs)
            if tensor is not None and name[0] in "qk"
            else tensor
            for name, tensor in weights.items()
        }
    input_norm = read(family.input_norm.format(layer=layer)) if family.input_norm else None
    return SourceAttention(
        **weights,  # type: ignore[arg-type]
        input_norm_weight=(
            torch.ones(geometry.hidden_size, device=device) if input_norm is None else input_norm + family.norm_offset
        ),
        norm_eps=source.norm_eps,
        logit_softcap=source.logit_softcap,
        num_attention_heads=geometry.num_attention_heads,
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
        rotary_pairs=None if rotary_dim == geometry.head_dim else pairs,
    )


def _separated(
    stored: dict[str, Tensor | None], family: FamilySpec, geometry: AttentionGeometry
) -> dict[str, Tensor | None]:
    """Weights and biases of the four projections by their fields, one fused projection taken apart."""
    separate: dict[str, Tensor | None] = {}
    for part in ("weight", "bias"):
        separate[f"o_{part}"] = stored[f"o_proj_{part}"]
        fused = stored.get(f"qkv_proj_{part}")
        names = [f"{which}_proj_{part}" for which in "qkv"]
        split = [stored.get(name) for name in names] if fused is None else _split_fused(fused, family, geometry)
        separate |= {f"{which}_{part}": tensor for which, tensor in zip("qkv", split, strict=True)}
    return separate


def _split_fused(rows: Tensor, family: FamilySpec, geometry: AttentionGeometry) -> tuple[Tensor, ...]:
    """Query, key and value rows of one fused projection (weight or bias)."""
    if family.qkv_layout == "per_head":  # GPT-NeoX: [H, 3, d]
        return tuple(part.flatten(0, 1) for part in rows.unflatten(0, (geometry.num_attention_heads, 3, -1)).unbind(1))
    queries, keys = (geometry.num_attention_heads, geometry.num_key_value_heads)
    return tuple(rows.split([width * geometry.head_dim for width in (queries, keys, keys)]))


def rotary_pairs_first(rows: Tensor, head_dim: int, pairs: int) -> Tensor:
    """Rows [n·d, ...] of heads whose first 2·pairs rows are rotated, half-split, in the order of `SourceAttention`: each
    half of a head starts with its half of the rotary rows. Scores do not change where queries and keys move alike."""
    heads = rows.unflatten(0, (-1, head_dim))
    static = head_dim // 2 - pairs
    first, second, left, right = heads.split([pairs, pairs, static, static], dim=1)
    return torch.cat([first, left, second, right], dim=1).flatten(0, 1)

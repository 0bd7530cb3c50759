"""What every initialisation offers to the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from xeco_convert.checkpoint import TensorReader
from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.factorize.attention import LayerErrors
from xeco_convert.families import AttentionGeometry, FamilySpec
from xeco_convert.plan import ConversionPlan

# (what, share of the work done from 0 to 1)
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """One converted layer: the source's weights, the factors, and what is known of their error.

    `details`: further figures for the report, as JSON types.
    """

    layer: int
    source: SourceAttention
    factors: MlaAttention
    errors: LayerErrors
    details: dict[str, Any] = field(default_factory=dict)


class Initialisation(Protocol):
    """Makes the factors of the converted layers, in the order of the layers, one in memory at a time."""

    def __init__(self, plan: ConversionPlan, device: torch.device, on_progress: Progress) -> None: ...

    def final_plan(self) -> ConversionPlan:
        """The plan with the widths that the rank policy chooses; looks at weights where it must."""
        ...

    def layers(self) -> Iterator[ConvertedLayer]:
        """Every converted layer of the final plan."""
        ...

    def summary(self) -> dict[str, Any]:
        """Figures of the whole conversion for the report, as JSON types; after the last layer."""
        ...


def read_attention(plan: ConversionPlan, reader: TensorReader, layer: int, device: torch.device) -> SourceAttention:
    """Attention weights of a source layer, float32 on `device`: separate projections, rotary pairs first in each half."""
    family, geometry, kind = plan.family, plan.geometry, plan.layers[layer].kind

    def read(name: str) -> torch.Tensor | None:
        if name not in plan.index.headers:
            return None
        return reader.read(name, dtype=torch.float32, device=device)

    tensors = {
        f"{which}_{part}": read(f"{plan.projection(which, layer)}.{part}")
        for which in family.attention
        for part in ("weight", "bias")
    }
    weights: dict[str, torch.Tensor | None] = {}
    for part in ("weight", "bias"):
        weights[f"o_{part}"] = tensors[f"o_proj_{part}"]
        fused = tensors.get(f"qkv_proj_{part}")
        names = [f"{which}_proj_{part}" for which in "qkv"]
        split = [tensors.get(name) for name in names] if fused is None else _split_fused(fused, family, geometry)
        weights |= {f"{which}_{part}": tensor for which, tensor in zip("qkv", split, strict=True)}
    for which in ("q", "k"):
        norm = tensors.get(f"{which}_norm_weight")
        weights[f"{which}_norm_weight"] = None if norm is None else norm + family.norm_offset
    pairs = kind.rotary_dim // 2
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
        norm_eps=plan.source.norm_eps,
        logit_softcap=plan.source.logit_softcap,
        num_attention_heads=geometry.num_attention_heads,
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
        rotary_pairs=None if kind.rotary_dim == geometry.head_dim else pairs,
    )


def _split_fused(rows: torch.Tensor, family: FamilySpec, geometry: AttentionGeometry) -> tuple[torch.Tensor, ...]:
    """Query, key and value rows of one fused projection (weight or bias)."""
    if family.qkv_layout == "per_head":  # GPT-NeoX: [H, 3, d]
        return tuple(part.flatten(0, 1) for part in rows.unflatten(0, (geometry.num_attention_heads, 3, -1)).unbind(1))
    queries, keys = (geometry.num_attention_heads, geometry.num_key_value_heads)
    return tuple(rows.split([width * geometry.head_dim for width in (queries, keys, keys)]))


def rotary_pairs_first(rows: torch.Tensor, head_dim: int, pairs: int) -> torch.Tensor:
    """Rows [n·d, ...] of heads whose first 2·pairs rows are rotated, half-split, in the order of `SourceAttention`: each
    half of a head starts with its half of the rotary rows. Scores do not change where queries and keys move alike."""
    heads = rows.unflatten(0, (-1, head_dim))
    static = head_dim // 2 - pairs
    first, second, left, right = heads.split([pairs, pairs, static, static], dim=1)
    return torch.cat([first, left, second, right], dim=1).flatten(0, 1)

"""What every initialisation offers to the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from xeco_convert.checkpoint import TensorReader
from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.factorize.attention import LayerErrors
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
    """Attention weights of a source layer, float32 on `device`."""
    geometry = plan.geometry

    def read(name: str) -> torch.Tensor | None:
        if name not in plan.index.headers:
            return None
        return reader.read(name, dtype=torch.float32, device=device)

    tensors = {
        f"{which[0]}_{part}": read(f"{plan.projection(which, layer)}.{part}")
        for which in ("q_proj", "k_proj", "v_proj", "o_proj")
        for part in ("weight", "bias")
    }
    return SourceAttention(
        **tensors,  # type: ignore[arg-type]
        input_norm_weight=read(plan.family.input_norm.format(layer=layer)),  # type: ignore[arg-type]
        num_attention_heads=geometry.num_attention_heads,
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
    )

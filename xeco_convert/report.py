"""What a conversion did, as data: ranks, errors and bytes; the table and the JSON are made from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.stopwatch import Timings


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer. KV numbers are cached numbers per token, `kv_bytes_after` their bytes, scales of codes included; key and value
    errors are relative, and these, widths and bits None for kept layers. `bits` says how a layer caches codes in words (4 + 8).

    `details`: what the initialisation knows beyond that (expected and measured errors, rotary frequencies, spectrum).
    `exactness_error` and `output_error` (relative, of the attention's output) are there for layers that --verify took.
    """

    layer: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    key_error: float | None
    value_error: float | None
    kv_numbers_before: int
    kv_numbers_after: int
    kv_bytes_after: int
    latent_bits: int | tuple[int, ...] | None = None
    rope_bits: int | tuple[int, ...] | None = None
    bits: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    exactness_error: float | None = None
    output_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The whole conversion. `summary`: calibration text and step-0 quality, where the initialisation has them. `path_error`:
    largest difference of logits, relative to their standard deviation, once the converted layers put out what the source's do
    (--verify): everything but their attention.

    `timings`: seconds and CPU seconds by part, where the initialisation says them. These, seconds and memory are left out of the
    file in OUT, which is the same for the same input."""

    source: str
    output: str
    init: str
    model_type: str
    dtype: str
    layers: tuple[LayerReport, ...]
    kv_bytes_per_number: int
    parameters_before: int
    parameters_after: int
    dropped: tuple[str, ...]
    summary: dict[str, Any] = field(default_factory=dict)
    path_error: float | None = None
    seconds: float = 0.0
    timings: Timings = field(default_factory=dict)
    peak_memory_bytes: int = 0

    @property
    def kv_bytes_before(self) -> int:
        """KV bytes per token of the source, all layers."""
        return sum(layer.kv_numbers_before for layer in self.layers) * self.kv_bytes_per_number

    @property
    def kv_bytes_after(self) -> int:
        """KV bytes per token of the converted model, all layers."""
        return sum(layer.kv_bytes_after for layer in self.layers)

    @property
    def kv_share(self) -> float:
        """Size of the converted cache as a share of the source's."""
        return self.kv_bytes_after / self.kv_bytes_before

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        totals = {
            "kv_bytes_before": self.kv_bytes_before,
            "kv_bytes_after": self.kv_bytes_after,
            "kv_share": self.kv_share,
        }
        return {**dataclasses.asdict(self), **totals}

    def reproducible(self) -> dict[str, Any]:
        """What is the same for the same input: without paths, time and memory."""
        ephemeral = ("seconds", "timings", "peak_memory_bytes", "output", "source")
        return {key: value for key, value in self.to_dict().items() if key not in ephemeral}

    def with_checks(self, checks: dict[int, tuple[float, float]]) -> ConversionReport:
        """The report with (exactness, output) errors of the layers that were verified."""
        layers = tuple(
            dataclasses.replace(layer, exactness_error=checks[layer.layer][0], output_error=checks[layer.layer][1])
            if layer.layer in checks
            else layer
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)


def format_cell(value: Any) -> str:
    """A value of a table as text: four digits, powers of ten where small, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return str(value)

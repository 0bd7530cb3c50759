"""The same rank for every layer."""

from __future__ import annotations


def fixed_ranks(num_layers: int, rank: int) -> tuple[int, ...]:
    """`rank` for each of `num_layers` layers."""
    return (rank,) * num_layers

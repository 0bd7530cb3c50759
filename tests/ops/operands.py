"""Inputs of the ops. How much error is allowed: rounding.py.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xeco_convert.ops.packed_rows import Bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Sizes(NamedTuple):
    """One shape of the problem."""

    Q: int
    T: int
    H: int
    R: int
    P: int
    B: int = 2

    @property
    def softmax_scale(self) -> float:
        return 1.3 / (self.R + self.P) ** 0.5


# 0 and 1 tokens, lengths that fill no tile, widths that are no multiple of any register, one head and many
SIZES = [
    Sizes(1, 1, 1, 16, 16),
    Sizes(1, 129, 32, 128, 32, 1),
    Sizes(1, 129, 3, 512, 128),
    Sizes(1, 700, 3, 24, 8),
    Sizes(0, 7, 3, 16, 16),
    Sizes(3, 0, 3, 16, 16),
    Sizes(7, 7, 3, 24, 8),
    Sizes(5, 129, 3, 7, 2),
    Sizes(129, 129, 3, 16, 16, 1),
    Sizes(4, 7, 32, 64, 64),
    Sizes(33, 65, 5, 320, 64, 1),
    Sizes(2, 129, 3, 48, 96),
    Sizes(2, 3, 3, 1, 2),
    Sizes(2, 3, 3, 16, 16, 0),
]
COMMON = Sizes(7, 129, 3, 24, 8)
# "falling": bit planes each of which reaches less than the one before
CODE_BITS: list[tuple[Any, Any]] = [
    (8, 8),
    (4, 8),
    (4, 4),
    (8, 4),
    (3, 6),
    (4, 3),
    ("falling", 8),
    ("falling", "falling"),
    ("steep", 5),
    (2, "steep"),
]


def possible(sizes: Sizes, bits: tuple[Any, Any]) -> Sizes:
    """The nearest widths that rows in these bits can have."""
    up = lambda width, to: -(-width // to) * to  # noqa: E731
    return sizes._replace(R=up(sizes.R, 2 if bits[0] in (8, 4) else 8), P=up(sizes.P, 2 if bits[1] in (8, 4) else 8))


def _planes(kind: str, width: int) -> Bits:
    """Bit planes that reach fewer numbers one after the other: all in the first two, or half of them already in the second."""
    half = width // 2 // 8 * 8 + 8 if width > 8 else 8
    return (width, width, half, 8, 8) if kind == "falling" else (width, half, half, 8)


def bits_for(sizes: Sizes, bits: tuple[Any, Any]) -> tuple[Bits, Bits]:
    """Bits of the latents and of the rotary keys, as the ops take them."""
    latent, rope = (
        _planes(each, width) if isinstance(each, str) else each
        for each, width in zip(bits, (sizes.R, sizes.P), strict=True)
    )
    return latent, rope


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q_latent, q_rope, c_kv, k_rope: the same numbers for every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed + 1000 * sizes.Q + sizes.T)
    shapes = [
        (sizes.B, sizes.Q, sizes.H, sizes.R),
        (sizes.B, sizes.Q, sizes.H, sizes.P),
        (sizes.B, sizes.T, sizes.R),
        (sizes.B, sizes.T, sizes.P),
    ]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


# What queries see: options of latent_attention for a batch of 2, Q = 7, T = 129.
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "everything": {"causal": False},
    "left padding": {"starts": torch.tensor([0, 77])},
    "left padding up to and beyond the first queries": {"starts": torch.tensor([122, 126])},
    "right padding": {"ends": torch.tensor([129, 125])},
    "both paddings, no causal order": {
        "starts": torch.tensor([3, 70]),
        "ends": torch.tensor([64, 129]),
        "causal": False,
    },
    "positions in a longer cache": {"query_positions": torch.tensor([20, 63])},
    "positions before the cache": {"query_positions": torch.tensor([-3, -9])},
    "positions behind the cache": {"query_positions": torch.tensor([400, 126])},
    "window": {"window": 11},
    "window of one": {"window": 1},
    "window, padding and positions": {
        "window": 30,
        "starts": torch.tensor([0, 50]),
        "ends": torch.tensor([100, 129]),
        "query_positions": torch.tensor([96, 60]),
    },
    "an empty range": {"starts": torch.tensor([60, 0]), "ends": torch.tensor([60, 129])},
    "soft-cap": {"softcap": 1.5},
    "soft-cap, window and padding": {"softcap": 0.7, "window": 50, "starts": torch.tensor([100, 2])},
}


def schema_order(sizes: Sizes, rule: dict[str, Any]) -> list[Any]:
    """The rule as the op itself takes it."""
    return [
        rule.get("starts"),
        rule.get("ends"),
        rule.get("query_positions"),
        sizes.softmax_scale,
        rule.get("causal", True),
        rule.get("window", 0),
        rule.get("softcap", 0.0),
    ]


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


def finite(lse: Tensor) -> Tensor:
    """lse with zeros for queries that see nothing, so that differences are numbers."""
    return lse.masked_fill(lse == -torch.inf, 0.0)

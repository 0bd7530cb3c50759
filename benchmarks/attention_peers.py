"""Latent attention and what it is compared with: the same attention in plain torch, three ways.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim and
v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.ops import latent_attention, latent_attention_decode

SCALE = 0.1
OURS = "fused"
DECOMPRESSED = "decompressed sdpa"
ABSORBED = ("absorbed sdpa", "absorbed bmm")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call. Q = 1 is a decode step over T tokens, Q = T a causal forward pass."""

    dtype: torch.dtype
    batch: int = 1
    queries: int = 1
    tokens: int = 4096
    heads: int = 32
    rank: int = 128
    rope: int = 32
    nope: int = 64

    @property
    def flop(self) -> float:
        """Counted work of the absorbed form: 2·(2R + P) for each head and pair of a query and a token that it sees."""
        pairs = self.tokens if self.queries == 1 else self.tokens * (self.tokens + 1) / 2
        return 2.0 * (2 * self.rank + self.rope) * self.heads * self.batch * pairs

    @property
    def cache_bytes(self) -> int:
        """Bytes of latents and rotary keys: what a decode step must read."""
        return self.batch * self.tokens * (self.rank + self.rope) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Queries [B, Q, H, R + P] and cached rows [B, T, R + P], each one buffer that the ops read in place; and keys and
    values [B, H, T, N + P] for the decompressed form, of which only the shapes matter (values padded to the width of
    keys, without which torch's fused kernels do not serve)."""

    case: Case
    queries: Tensor
    rows: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, case: Case, *, requires_grad: bool = False) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator).to(case.dtype)
            return made.requires_grad_(requires_grad)

        width, expanded = case.rank + case.rope, case.nope + case.rope
        return cls(
            case=case,
            queries=normal(case.batch, case.queries, case.heads, width),
            rows=normal(case.batch, case.tokens, width),
            keys=normal(case.batch, case.heads, case.tokens, expanded),
            values=normal(case.batch, case.heads, case.tokens, expanded),
        )

    def without_keys(self) -> Inputs:
        """The same with no keys and values, where their memory would be counted."""
        nothing = torch.empty(0)
        return replace(self, keys=nothing, values=nothing)


def fused(inputs: Inputs) -> Tensor:
    """The op of this package."""
    rank = inputs.case.rank
    parts = (
        *(inputs.queries[..., :rank], inputs.queries[..., rank:]),
        *(inputs.rows[..., :rank], inputs.rows[..., rank:]),
    )
    if inputs.case.queries == 1:
        return latent_attention_decode(*parts, softmax_scale=SCALE)[0]
    return latent_attention(*parts, softmax_scale=SCALE)[0]


def absorbed_sdpa(inputs: Inputs) -> Tensor:
    """Rows as keys and values; in a decode step the heads take the place of the query tokens."""
    case, rows = inputs.case, inputs.rows.unsqueeze(1)
    if case.queries == 1:
        out = functional.scaled_dot_product_attention(inputs.queries, rows, rows, scale=SCALE)
        return out[..., : case.rank]
    rows = rows.expand(-1, case.heads, -1, -1)
    out = functional.scaled_dot_product_attention(
        inputs.queries.transpose(1, 2), rows, rows, is_causal=True, scale=SCALE
    )
    return out.transpose(1, 2)[..., : case.rank]


def absorbed_bmm(inputs: Inputs) -> Tensor:
    """Scores, softmax and weighted sum as three calls: all query rows of a sequence in one product."""
    case = inputs.case
    flat = inputs.queries.flatten(1, 2)  # [B, Q·H, R + P]
    scores = torch.bmm(flat, inputs.rows.transpose(1, 2)) * SCALE
    if case.queries > 1:
        future = torch.ones(case.queries, case.tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future.repeat_interleave(case.heads, dim=0), -torch.inf)
    out = torch.bmm(scores.softmax(dim=-1), inputs.rows[..., : case.rank])
    return out.unflatten(1, (case.queries, case.heads))


def decompressed_sdpa(inputs: Inputs) -> Tensor:
    """Keys and values of every head, as a cache without latents would hold them."""
    case = inputs.case
    queries = inputs.queries[..., : case.nope + case.rope].transpose(1, 2)
    return functional.scaled_dot_product_attention(
        queries, inputs.keys, inputs.values, is_causal=case.queries > 1, scale=SCALE
    )


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: fused,
    "absorbed sdpa": absorbed_sdpa,
    "absorbed bmm": absorbed_bmm,
    DECOMPRESSED: decompressed_sdpa,
}

"""Latent attention and what it is compared with: the same attention in plain torch, three ways.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim and
v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


class Inputs:
    """What the implementations are given.

    parts: q_latent [B, Q, H, R], q_rope [B, Q, H, P], c_kv [B, T, R] and k_rope [B, T, P], as a model has them; gradients
    are taken with respect to these. joined(): queries [B, Q, H, R + P] and rows [B, T, R + P], which torch's own attention
    needs: made beforehand for inference (a kindness), by `cat` in every training step. keys and values [B, H, T, N + P]:
    the decompressed form, of which only the shapes matter (values padded to the width of keys, without which torch's fused
    kernels do not serve); none for training.
    """

    def __init__(self, case: Case, *, training: bool = False) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(0)
        width = case.rank + case.rope
        queries, rows = (
            self._normal(case.batch, case.queries, case.heads, width),
            self._normal(case.batch, case.tokens, width),
        )
        self.parts = tuple(part for both in (queries, rows) for part in both.split([case.rank, case.rope], dim=-1))
        self._joined: tuple[Tensor, Tensor] | None = (queries, rows)
        self.keys = self.values = torch.empty(0)
        if training:
            self._joined = None
            self.parts = tuple(part.clone().requires_grad_() for part in self.parts)

    def with_keys(self) -> Inputs:
        """The same with keys and values."""
        shape = (self.case.batch, self.case.heads, self.case.tokens, self.case.nope + self.case.rope)
        self.keys, self.values = self._normal(*shape), self._normal(*shape)
        return self

    def joined(self) -> tuple[Tensor, Tensor]:
        """Queries and rows."""
        if self._joined is not None:
            return self._joined
        q_latent, q_rope, c_kv, k_rope = self.parts
        return torch.cat([q_latent, q_rope], dim=-1), torch.cat([c_kv, k_rope], dim=-1)

    def forget_gradients(self) -> None:
        """Free them."""
        for part in self.parts:
            part.grad = None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.case.dtype)


def fused(inputs: Inputs) -> Tensor:
    """The op of this package."""
    if inputs.case.queries == 1:
        return latent_attention_decode(*inputs.parts, softmax_scale=SCALE)[0]
    return latent_attention(*inputs.parts, softmax_scale=SCALE)[0]


def absorbed_sdpa(inputs: Inputs) -> Tensor:
    """Rows as keys and values; in a decode step the heads take the place of the query tokens."""
    case = inputs.case
    queries, rows = inputs.joined()
    rows = rows.unsqueeze(1)
    if case.queries == 1:
        return functional.scaled_dot_product_attention(queries, rows, rows, scale=SCALE)[..., : case.rank]
    rows = rows.expand(-1, case.heads, -1, -1)
    out = functional.scaled_dot_product_attention(queries.transpose(1, 2), rows, rows, is_causal=True, scale=SCALE)
    return out.transpose(1, 2)[..., : case.rank]


def absorbed_bmm(inputs: Inputs) -> Tensor:
    """Scores, softmax and weighted sum as three calls: all query rows of a sequence in one product."""
    case = inputs.case
    queries, rows = inputs.joined()
    scores = torch.bmm(queries.flatten(1, 2), rows.transpose(1, 2)) * SCALE
    if case.queries > 1:
        future = torch.ones(case.queries, case.tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future.repeat_interleave(case.heads, dim=0), -torch.inf)
    out = torch.bmm(scores.softmax(dim=-1), rows[..., : case.rank])
    return out.unflatten(1, (case.queries, case.heads))


def decompressed_sdpa(inputs: Inputs) -> Tensor:
    """Keys and values of every head, as a cache without latents would hold them."""
    case = inputs.case
    queries = inputs.joined()[0][..., : case.nope + case.rope].transpose(1, 2)
    return functional.scaled_dot_product_attention(
        queries, inputs.keys, inputs.values, is_causal=case.queries > 1, scale=SCALE
    )


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: fused,
    "absorbed sdpa": absorbed_sdpa,
    "absorbed bmm": absorbed_bmm,
    DECOMPRESSED: decompressed_sdpa,
}

"""Latent attention on a GPU and what it is compared with, from the tensors that a layer has to those that it hands on.

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim and
v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.ops import latent_attention, latent_attention_decode, latent_attention_packed
from xeco_convert.ops.packed_rows import pack_rows, unpack_rows


@dataclass(frozen=True, kw_only=True)
class GpuCase:
    """Sizes of one call in bfloat16."""

    batch: int
    queries: int
    tokens: int
    rank: int
    rope: int
    heads: int = 32
    nope: int = 64

    @property
    def name(self) -> str:
        """As it stands in tables."""
        what = "decode" if self.queries == 1 else "forward"
        return f"{what}, B {self.batch}, T {self.tokens}, H {self.heads}, R {self.rank}+{self.rope}"

    @property
    def scale(self) -> float:
        """Of the decompressed form: one softmax in all of them."""
        return float((self.nope + self.rope) ** -0.5)

    @property
    def flop(self) -> float:
        """Counted work: 2·(2R + P) for each head and pair of a query and a token that it sees."""
        pairs = self.tokens if self.queries == 1 else self.tokens * (self.tokens + 1) / 2
        return 2.0 * (2 * self.rank + self.rope) * self.heads * self.batch * pairs

    @property
    def cache_bytes(self) -> int:
        """Latents and rotary keys, read once."""
        return self.batch * self.tokens * (self.rank + self.rope) * 2

    def code_bytes(self, bits: tuple[int, int]) -> int:
        """The same in codes of so many bits, with their scales."""
        return self.batch * self.tokens * (self.rank * bits[0] // 8 + self.rope * bits[1] // 8 + 4)


class Layer:
    """q_nope [B, Q, H, N], q_rope [B, Q, H, P], c_kv [B, T, R], k_rope [B, T, P], w_uk and w_uv [H, R, N]: the logits of all
    implementations agree."""

    def __init__(self, case: GpuCase, *, training: bool = False, device: str = "cuda") -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * size
            return made.requires_grad_(training)

        self.q_nope = normal(case.batch, case.queries, case.heads, case.nope)
        self.q_rope = normal(case.batch, case.queries, case.heads, case.rope)
        self.c_kv = normal(case.batch, case.tokens, case.rank)
        self.k_rope = normal(case.batch, case.tokens, case.rope)
        self.w_uk = normal(case.heads, case.rank, case.nope, size=case.rank**-0.5)
        self.w_uv = normal(case.heads, case.rank, case.nope, size=case.rank**-0.5)

    @property
    def leaves(self) -> list[Tensor]:
        """Whatever has a gradient."""
        return [self.q_nope, self.q_rope, self.c_kv, self.k_rope, self.w_uk, self.w_uv]

    def q_latent(self) -> Tensor:
        """[B, Q, H, R]."""
        return torch.einsum("bqhn,hrn->bqhr", self.q_nope, self.w_uk)

    def output(self, latent: Tensor) -> Tensor:
        """[B, Q, H, N] of [B, Q, H, R]."""
        return torch.einsum("bqhr,hrn->bqhn", latent, self.w_uv)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[B, H, T, N + P], values with zeros up to that width: torch's flash kernels want them equal."""
        keys = torch.einsum("btr,hrn->bhtn", self.c_kv, self.w_uk)
        values = torch.einsum("btr,hrn->bhtn", self.c_kv, self.w_uv)
        rotary = self.k_rope.unsqueeze(1).expand(-1, self.case.heads, -1, -1)
        return torch.cat([keys, rotary], dim=-1), functional.pad(values, (0, self.case.rope))

    def queries(self) -> Tensor:
        """[B, H, Q, N + P]."""
        return torch.cat([self.q_nope, self.q_rope], dim=-1).transpose(1, 2)


def fused(layer: Layer) -> Tensor:
    """This package's op, with the products that absorb W_UK and W_UV."""
    out, _ = latent_attention(layer.q_latent(), layer.q_rope, layer.c_kv, layer.k_rope, softmax_scale=layer.case.scale)
    return layer.output(out)


def expanded_sdpa(layer: Layer) -> Tensor:
    """Keys and values of every head made in the step, torch's flash attention over them."""
    keys, values = layer.keys_and_values()
    queries = layer.queries()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=layer.case.scale)
    return out[..., : layer.case.nope].transpose(1, 2)


def absorbed_sdpa(layer: Layer) -> Tensor:
    """The absorbed form in torch's attention, whichever of its kernels takes these widths: one latent for all heads."""
    queries = torch.cat([layer.q_latent(), layer.q_rope], dim=-1).transpose(1, 2)
    keys = torch.cat([layer.c_kv, layer.k_rope], dim=-1).unsqueeze(1).expand(-1, layer.case.heads, -1, -1)
    values = functional.pad(layer.c_kv, (0, layer.case.rope)).unsqueeze(1).expand(-1, layer.case.heads, -1, -1)
    out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=layer.case.scale)
    return layer.output(out[..., : layer.case.rank].transpose(1, 2))


def flex(layer: Layer) -> Tensor:
    """FlexAttention, compiled, in the absorbed form: one head of keys for all heads of queries."""
    queries = torch.cat([layer.q_latent(), layer.q_rope], dim=-1).transpose(1, 2)
    keys = torch.cat([layer.c_kv, layer.k_rope], dim=-1).unsqueeze(1)
    mask = _causal(layer.case.queries, layer.case.tokens, layer.c_kv.device)
    out = _compiled_flex()(
        queries, keys, layer.c_kv.unsqueeze(1), block_mask=mask, scale=layer.case.scale, enable_gqa=True
    )
    return layer.output(out.transpose(1, 2))


def decode_fused(layer: Layer) -> Callable[[], Tensor]:
    """The kernel alone: q_latent is made beforehand."""
    q_latent = layer.q_latent()
    return lambda: latent_attention_decode(
        q_latent, layer.q_rope, layer.c_kv, layer.k_rope, softmax_scale=layer.case.scale
    )[0]


def decode_paged(layer: Layer, page_size: int = 64) -> Callable[[], Tensor]:
    """The same from pages in random order."""
    case, q_latent = layer.case, layer.q_latent()
    pages = case.batch * case.tokens // page_size
    device = layer.c_kv.device
    table = torch.randperm(pages, device=device).to(torch.int32).view(case.batch, -1)
    caches = []
    for rows in (layer.c_kv, layer.k_rope):
        cache = rows.new_empty(pages, page_size, rows.shape[-1])
        cache[table.flatten().long()] = rows.view(pages, page_size, -1)
        caches.append(cache)
    lengths = torch.full((case.batch,), case.tokens, device=device)
    return lambda: latent_attention_decode(
        q_latent, layer.q_rope, *caches, softmax_scale=case.scale, block_table=table, lengths=lengths
    )[0]


def decode_packed(layer: Layer, bits: tuple[int, int]) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The same over codes of so many bits for latents and rotary keys, and over the rows that these stand for."""
    q_latent, scale = layer.q_latent(), layer.case.scale
    # sequence by sequence: float32 of the whole cache would not fit
    codes = [
        torch.cat([pack_rows(part, each) for part in whole.split(1)])
        for whole, each in zip((layer.c_kv, layer.k_rope), bits, strict=True)
    ]
    rows = [
        torch.cat([unpack_rows(part, each, layer.c_kv.dtype) for part in whole.split(1)])
        for whole, each in zip(codes, bits, strict=True)
    ]
    how = {"latent_bits": bits[0], "rope_bits": bits[1], "softmax_scale": scale}
    return (
        lambda: latent_attention_packed(q_latent, layer.q_rope, *codes, **how)[0],
        lambda: latent_attention_decode(q_latent, layer.q_rope, *rows, softmax_scale=scale)[0],
    )


def decode_decompressed(layer: Layer) -> Callable[[], Tensor]:
    """A cache of keys and values of every head, which is there beforehand, in torch's flash attention."""
    with torch.no_grad():
        keys, values = layer.keys_and_values()
    queries = layer.queries()

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(queries, keys, values, scale=layer.case.scale)

    return run


_MADE: dict[object, object] = {}


def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if "flex" not in _MADE:
        _MADE["flex"] = torch.compile(flex_attention, dynamic=False)
    return _MADE["flex"]  # type: ignore[return-value]


def _causal(queries: int, tokens: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return token <= query + (tokens - queries)

    if (queries, tokens) not in _MADE:
        _MADE[queries, tokens] = create_block_mask(visible, None, None, queries, tokens, device=device)
    return _MADE[queries, tokens]

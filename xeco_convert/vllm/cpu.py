"""Attention over latents on the CPU in vLLM, by this project's kernels: any width, windows and soft caps, one pass over pages.

vLLM's own CPU kernel for latents decodes 512 + 64 alone and reads prompts through dense scores.

Letters: T tokens of all requests, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.attention.backend import AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from xeco_convert.ops import latent_attention_decode
from xeco_convert.ops.choice import AttentionCall, choose, fused_obstacle
from xeco_convert.ops.extension import kernel_obstacle
from xeco_convert.ops.torch_attention import reference_attention


@dataclass
class CpuLatentMetadata:
    """One step of the scheduler. `first_rows`: where each request's new tokens begin among all, and their end; `lengths` int64
    and `block_table` int32 [requests, pages], with the new tokens counted; `single`: all requests have one new token."""

    num_actual_tokens: int
    first_rows: list[int]
    lengths: Tensor
    block_table: Tensor
    single: bool


class CpuLatentBuilder(AttentionMetadataBuilder):
    """Makes the metadata of a step, once for all layers of one width."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> CpuLatentMetadata:
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        return CpuLatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            first_rows=common.query_start_loc_cpu[: count + 1].tolist(),
            lengths=common.seq_lens[:count].to(torch.int64),
            block_table=common.block_table_tensor[:count].to(torch.int32),
            single=common.max_query_len == 1 and common.num_actual_tokens == count,
        )


class CpuLatentBackend(CPUMLABackend):
    """vLLM's CPU backend for latents without its list of widths."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @staticmethod
    def get_name() -> str:
        return "XECO_CPU_MLA"

    @staticmethod
    def get_builder_cls() -> type[CpuLatentBuilder]:
        return CpuLatentBuilder


class CpuLatentAttention(MLAAttention):
    """vLLM's layer with a cache of latents; what it computes is here."""

    def __init__(self, settings: dict[str, Any], *, window: int | None, softcap: float | None) -> None:
        super().__init__(**settings, attn_backend=CpuLatentBackend)
        self.window = window
        self.softcap = softcap

    def update_kv_cache(
        self, kv_c_normed: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor | None, *_: Any
    ) -> None:
        """Write latents [T, R] and rotated keys [T, 1, P] to the slots that are not negative (padding)."""
        if slot_mapping is None or kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten().to(torch.int64)
        rows = torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1)[: slots.shape[0]]
        if bool((slots < 0).any()):
            rows, slots = rows[slots >= 0], slots[slots >= 0]
        kv_cache.view(-1, kv_cache.shape[-1])[slots] = rows.to(kv_cache.dtype)

    def forward_impl(
        self,
        q: Tensor,
        k_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        attn_metadata: CpuLatentMetadata | None,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        """q [T, H, N + P] over kv_cache [pages, page_size, R + P], which holds the new tokens already -> output [T, H·V]."""
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        step = attn_metadata
        queries = q[: step.num_actual_tokens]
        heads_out = output[: step.num_actual_tokens].unflatten(-1, (self.num_heads, self.v_head_dim))
        if step.single:
            heads_out.copy_(self._attend(queries.unsqueeze(1), kv_cache, step.block_table, step.lengths).squeeze(1))
            return output
        for request, (first, end) in enumerate(zip(step.first_rows, step.first_rows[1:], strict=False)):
            if first < end:
                one = slice(request, request + 1)
                table, lengths = step.block_table[one], step.lengths[one]
                heads_out[first:end] = self._attend(queries[first:end].unsqueeze(0), kv_cache, table, lengths)[0]
        return output

    def _attend(self, queries: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        """The last Q tokens [B, Q, H, N + P] of each request over all of its tokens -> [B, Q, H, V]."""
        q_nope, q_rope = queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        call = self._call(queries.shape[1], int(lengths.max()), queries.dtype)
        if self.softcap is None and self.window is None and choose(call).implementation == "expanded":
            parts = [self._expanded(*row, kv_cache) for row in zip(queries, block_table, lengths.tolist(), strict=True)]
            return torch.stack(parts)
        q_latent = torch.einsum("bqhn,hnr->bqhr", q_nope, self.W_UK_T)
        if fused_obstacle(call) is None:
            out_BQHR = self._fused(q_latent, q_rope, kv_cache, block_table, lengths)
        else:
            rows = zip(q_latent, q_rope, block_table, lengths.tolist(), strict=True)
            out_BQHR = torch.stack([self._absorbed(*row, kv_cache) for row in rows])
        return torch.einsum("bqhr,hrv->bqhv", out_BQHR, self.W_UV)

    def _call(self, num_queries: int, num_tokens: int, dtype: torch.dtype) -> AttentionCall:
        return AttentionCall(
            num_queries=num_queries,
            num_tokens=num_tokens,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            soft_capped=self.softcap is not None,
            kernel_obstacle=kernel_obstacle("cpu", dtype),
        )

    def _fused(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor
    ) -> Tensor:
        """By the compiled kernels [B, Q, H, R], which read pages where they lie."""
        c_kv, k_rope = kv_cache.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        if self.qk_rope_head_dim == 0:  # the kernels take at least one pair, here of zeros that are stored once
            q_rope = functional.pad(q_rope, (0, 2))
            k_rope = kv_cache.new_zeros(1, 1, 2).expand(*kv_cache.shape[:2], 2)
        return latent_attention_decode(
            q_latent,
            q_rope,
            c_kv,
            k_rope,
            softmax_scale=self.scale,
            block_table=block_table,
            lengths=lengths,
            window=self.window,
            softcap=self.softcap,
        )[0]

    def _rows(self, pages: Tensor, length: int, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [length, R] and rotated keys [length, P] of one request, laid side by side."""
        count = -(-length // kv_cache.shape[1])
        rows = kv_cache[pages[:count].long()].flatten(0, 1)[:length]
        c_kv, k_rope = rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return c_kv, k_rope

    def _expanded(self, queries: Tensor, pages: Tensor, length: int, kv_cache: Tensor) -> Tensor:
        """Keys and values of every head from the latents: fewer operations for many new tokens [Q, H, N + P] -> [Q, H, V]."""
        c_kv, k_rope = self._rows(pages, length, kv_cache)
        k_nope = torch.einsum("tr,hnr->htn", c_kv, self.W_UK_T)
        keys = torch.cat([k_nope, k_rope.expand(self.num_heads, -1, -1)], dim=-1)
        values = torch.einsum("tr,hrv->htv", c_kv, self.W_UV)
        mask = None if queries.shape[0] == length else self._mask(queries.shape[0], length)
        out = functional.scaled_dot_product_attention(
            queries.transpose(0, 1), keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return out.transpose(0, 1)

    def _absorbed(self, q_latent: Tensor, q_rope: Tensor, pages: Tensor, length: int, kv_cache: Tensor) -> Tensor:
        """In plain torch, where no compiled kernel serves: [Q, H, R]."""
        c_kv, k_rope = self._rows(pages, length, kv_cache)
        out, _ = reference_attention(
            q_latent.unsqueeze(0),
            q_rope.unsqueeze(0),
            c_kv.unsqueeze(0),
            k_rope.unsqueeze(0),
            softmax_scale=self.scale,
            attention_mask=self._mask(q_latent.shape[0], length),
            softcap=self.softcap,
        )
        return out[0]

    def _mask(self, num_queries: int, length: int) -> Tensor:
        """Which tokens each of the last queries sees, boolean [Q, length]."""
        query = torch.arange(length - num_queries, length).unsqueeze(1)
        token = torch.arange(length)
        seen = token <= query
        return seen if self.window is None else seen & (token > query - self.window)

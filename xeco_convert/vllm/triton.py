"""Attention over latents on GPUs in vLLM: its Triton MLA decode kernel and FlashAttention prefill, for widths of any layer.

Read against vLLM 0.32 and not run: no GPU was at hand. Where vLLM takes the widths of one model-wide latent for granted, the
classes here take those of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAMetadataBuilder

_HEAD_STEP = 8  # FlashAttention takes heads of a multiple of this width


@dataclass
class AnyWidthMetadata(MLACommonMetadata):
    """vLLM's metadata without its list of head sizes, of which it looks for the model's, not for the layer's."""

    def __post_init__(self) -> None:
        return None


class AnyWidthBuilder(TritonMLAMetadataBuilder):
    """vLLM's builder, making that metadata."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.metadata_cls = AnyWidthMetadata


class AnyWidthBackend(TritonMLABackend):
    """vLLM's Triton MLA; each width of latents is a group of layers with its own metadata and workspace."""

    @staticmethod
    def get_name() -> str:
        return "TRITON_MLA"

    @staticmethod
    def get_builder_cls() -> type[AnyWidthBuilder]:
        return AnyWidthBuilder


class AnyWidthPrefill(FlashAttnPrefillBackend):
    """FlashAttention over expanded keys and values, padded with zeros to a width that it takes: the result is the same."""

    def __init__(self, *, vllm_config: Any, **named: Any) -> None:
        kernels = vllm_config.kernel_config
        warm_up, kernels.enable_jit_warmup = (
            kernels.enable_jit_warmup,
            False,
        )  # it would ask config.json for one kv_lora_rank
        try:
            super().__init__(vllm_config=vllm_config, **named)
        finally:
            kernels.enable_jit_warmup = warm_up

    def _flash_attn_varlen_diff_headdims(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool = False,
        softmax_scale: float | None = None,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
        **named: Any,
    ) -> Any:
        width = v.shape[-1]
        padded = -(-max(q.shape[-1], width) // _HEAD_STEP) * _HEAD_STEP
        q, k, v = (functional.pad(x, (0, padded - x.shape[-1])) for x in (q, k, v))
        result = super()._flash_attn_varlen_diff_headdims(
            q, k, v, return_softmax_lse=return_softmax_lse, softmax_scale=softmax_scale, **named
        )
        if return_softmax_lse:
            return result[0][..., :width], result[1]
        return result[..., :width]

    def supports_out(self) -> bool:
        return False  # the result is cut out of a padded one


class GpuLatentAttention(MLAAttention):
    """vLLM's layer with a cache of latents."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, attn_backend=AnyWidthBackend, prefill_backend_cls=AnyWidthPrefill)

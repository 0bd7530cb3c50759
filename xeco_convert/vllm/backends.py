"""Which attention runs the latents of a layer: this project's kernels on the CPU, vLLM's Triton MLA elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.platforms import current_platform

from xeco_convert.modeling.layer_xeco import MlaLayer


def device_kind() -> str:
    """ "cpu", or "gpu" for CUDA and ROCm."""
    return "cpu" if current_platform.is_cpu() else "gpu"


def make_latent_attention(
    layer: MlaLayer,
    *,
    num_heads: int,
    scale: float,
    window: int | None,
    kv_b_proj: nn.Module,
    vllm_config: Any,
    prefix: str,
) -> Any:
    """vLLM's attention over a cache of latents, for `num_heads` heads of this rank; `prefix` is its name among vLLM's layers."""
    settings: dict[str, Any] = {
        "num_heads": num_heads,
        "scale": scale,
        "qk_nope_head_dim": layer.qk_nope_head_dim,
        "qk_rope_head_dim": layer.qk_rope_head_dim,
        "v_head_dim": layer.v_head_dim,
        "q_lora_rank": layer.q_lora_rank,
        "kv_lora_rank": layer.kv_lora_rank,
        "kv_b_proj": kv_b_proj,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": prefix,
    }
    if device_kind() == "cpu":
        from xeco_convert.vllm.cpu import CpuLatentAttention

        return CpuLatentAttention(settings, window=window, softcap=layer.logit_softcap)
    from xeco_convert.vllm.triton import GpuLatentAttention

    return GpuLatentAttention(**settings)

"""What the model calls when the compiled kernels serve: the op for the occasion, and the inputs as it takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xeco_convert.ops._latent_attention import dense, latent_attention
from xeco_convert.ops._latent_attention_decode import latent_attention_decode
from xeco_convert.ops._latent_attention_packed import latent_attention_packed
from xeco_convert.ops.extension import kernel_obstacle, takes_codes
from xeco_convert.ops.mask_ranges import Ranges, ranges_of
from xeco_convert.ops.packed_rows import Bits

__all__ = ["Ranges", "fused_attention", "kernel_obstacle", "ranges_of", "takes_codes", "unasked_obstacle"]


def unasked_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels are not taken unless XECO_ATTENTION asks for them, in words; None where they are."""
    obstacle: str | None = kernel_obstacle(device_type, dtype)
    if obstacle is None and device_type == "cuda" and torch.version.hip is not None:
        # An emulated AMD GPU has run them, no real one: nobody shall be the first without knowing.
        return "the kernels have not run on an AMD GPU yet: XECO_ATTENTION=fused takes them"
    return obstacle


def fused_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    ranges: Ranges | None = None,
    bits: tuple[Bits, Bits] | None = None,
) -> Tensor:
    """`latent_attention` of the model: q_latent [B, Q, H, R], q_rope [B, Q, H, P], c_kv [B, T, R], k_rope [B, T, P] -> out.

    They are brought to one dtype first (autocast leaves rotated keys in float32). softcap bounds the scores.
    ranges: what the mask says, for B sequences or for one that stands for all; None: the queries are the last of T tokens,
    in causal order. bits: c_kv and k_rope are codes of so many bits, which only `takes_codes` devices take.
    """
    queries = [dense(tensor.to(dtype)) for tensor in (q_latent, q_rope)]
    rows = [c_kv, k_rope] if bits is not None else [dense(tensor.to(dtype)) for tensor in (c_kv, k_rope)]
    tensors = queries + rows
    starts = ends = positions = window = None
    if ranges is not None:
        starts, ends, positions = (_for_each(x, q_latent.shape[0]) for x in ranges[:3])
        window = ranges.window
    rule: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "starts": starts}
    # One query sees an interval, whatever window made it: starts and lengths say it all.
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if bits is None and q_latent.shape[1] == 1 and not needs_gradients:
        return latent_attention_decode(*tensors, **rule, lengths=ends)[0]
    rule |= {"ends": ends, "query_positions": positions, "window": window}
    if bits is not None:
        return latent_attention_packed(*tensors, **rule, latent_bits=bits[0], rope_bits=bits[1])[0]
    return latent_attention(*tensors, **rule)[0]


def _for_each(values: Tensor, batch: int) -> Tensor:
    """One value [1] that stands for all sequences, as [B]; others as they are."""
    return values if values.shape[0] == batch else values.expand(batch).contiguous()

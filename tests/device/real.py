"""The ops on a GPU of this machine, with the interface of `Emulated`: the same tests run on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xeco_convert import ops
from xeco_convert.ops.packed_rows import Bits, layout_number


@dataclass(frozen=True, kw_only=True)
class Real:
    """The public functions on device "cuda". The fields are the emulated machine's: here the library chooses."""

    max_shared_bytes: int = 0
    max_stages: int = 0
    num_groups: int = 0

    def latent_attention(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
        """q_latent, q_rope, c_kv, k_rope -> out, lse."""
        out, lse = ops.latent_attention(*map(on_gpu, tensors), **_moved(rule))
        return out.cpu(), lse.cpu()

    def latent_attention_decode(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
        """The same for the last queries of a cache, contiguous or paged."""
        out, lse = ops.latent_attention_decode(*map(on_gpu, tensors), **_moved(rule))
        return out.cpu(), lse.cpu()

    def latent_attention_packed(
        self, *tensors: Tensor, num_splits: int | None = None, **rule: Any
    ) -> tuple[Tensor, Tensor]:
        """Over rows of codes; the library divides the tokens."""
        out, lse = ops.latent_attention_packed(*map(on_gpu, tensors), **_moved(rule))
        return out.cpu(), lse.cpu()

    def latent_attention_backward(
        self, d_out: Tensor, d_lse: Tensor | None, tensors: list[Tensor], out: Tensor, lse: Tensor, **rule: Any
    ) -> list[Tensor]:
        """Gradients of q_latent, q_rope, c_kv and k_rope."""
        moved = [None if x is None else on_gpu(x) for x in (d_out, d_lse, *tensors, out, lse)]
        options = _moved(rule)
        ranges = [options.get(name) for name in ("starts", "ends", "query_positions")]
        settings = [
            options["softmax_scale"],
            options.get("causal", True),
            options.get("window") or 0,
            options.get("softcap") or 0.0,
        ]
        return [x.cpu() for x in torch.ops.xeco.latent_attention_backward(*moved, *ranges, *settings)]

    def pack_rows(self, rows: Tensor, bits: Bits) -> Tensor:
        """The kernel, whatever the public function takes on a GPU."""
        packed: Tensor = torch.ops.xeco.pack_rows(on_gpu(rows), layout_number(bits, rows.shape[-1]))
        return packed.cpu()

    def rope_and_append(self, *tensors: Tensor, positions: Tensor, block_table: Tensor | None = None) -> None:
        """c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache: the caches are changed."""
        moved = [on_gpu(x) for x in tensors]
        ops.rope_and_append(*moved, **_moved({"positions": positions, "block_table": block_table}))
        for host, device in zip(tensors[4:], moved[4:], strict=True):
            host.copy_(device)


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy with the same strides and offset, and whatever lies around it."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _moved(rule: dict[str, Any]) -> dict[str, Any]:
    return {name: on_gpu(value) if isinstance(value, Tensor) else value for name, value in rule.items()}

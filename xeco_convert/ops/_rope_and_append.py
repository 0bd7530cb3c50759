"""The op xeco::rope_and_append: rotate new keys and write them and their latents into the cache, in one pass.

It is for engines that own their cache. The model in xeco_convert/modeling/ keeps the stock caches of transformers, whose
`update` does the writing; writing past it would mean to keep their private counters by hand, for each kind of layer.

Letters: B batch, Q new tokens, T slots of the cache, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xeco_convert.ops.checks import check_float, check_integers, check_pages, check_tensor, check_values, run_checked
from xeco_convert.ops.extension import first_loaded_for

_OP = "rope_and_append"
_LIBRARY = torch.library.Library("xeco", "FRAGMENT")
_LIBRARY.define(
    "rope_and_append(Tensor c_kv, Tensor k_rope, Tensor cos, Tensor sin, Tensor(a!) c_kv_cache, Tensor(b!) k_rope_cache, "
    "Tensor? block_table, Tensor positions) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


class _Arguments(NamedTuple):
    """Those of the schema, in its order."""

    c_kv: Tensor
    k_rope: Tensor
    cos: Tensor
    sin: Tensor
    c_kv_cache: Tensor
    k_rope_cache: Tensor
    block_table: Tensor | None
    positions: Tensor

    @property
    def page_size(self) -> int:
        """Slots of a page, or of a sequence where there is no table."""
        return self.c_kv_cache.shape[1]


def rope_and_append(
    c_kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    c_kv_cache: Tensor,
    k_rope_cache: Tensor,
    *,
    positions: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write c_kv, and k_rope · cos + rotate_half(k_rope) · sin, into slots positions[b] to positions[b] + Q − 1 of the cache.

    c_kv [B, Q, R] and k_rope [B, Q, P], not yet rotated, P even; cos and sin [B or 1, Q, P] in the half-split layout of
    transformers, in the dtype of k_rope or float32. The caches are changed in place: c_kv_cache [B, T, R] and k_rope_cache
    [B, T, P], or pages [num_pages, page_size, R] and [num_pages, page_size, P] with block_table int32 [B, max_pages].
    positions int64 [B]: the slot of the first new token. One dtype (float32, bfloat16, float16; float64 in plain torch) and
    device; any strides, the last dimension dense. The rotation is computed in float32 or better and rounded once.

    Raises `ValueError` for shapes, dtypes and devices that do not fit and where a gradient would be needed; `ValueError` or
    `RuntimeError`, before anything is written, for slots outside the cache and pages that do not exist.

    Source: RoFormer (arXiv 2104.09864), equation 34, with the pairs half a head apart.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache)):
        raise ValueError(f"{_OP}: has no gradient: expected torch.no_grad() or detached inputs")
    arguments = (c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache, block_table, positions)
    if c_kv.dtype == torch.float64:
        _check(*arguments)
        _check_data(*arguments)
        rope_and_append_reference(*arguments)
    else:
        run_checked(torch.ops.xeco.rope_and_append, _check, arguments)


def rope_and_append_reference(*arguments: Any) -> None:
    """The op written from the formula; its arguments are those of the schema."""
    call = _Arguments(*arguments)
    wide = torch.promote_types(call.k_rope.dtype, torch.float32)
    first, second = call.k_rope.to(wide).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = call.k_rope.to(wide) * call.cos.to(wide) + turned * call.sin.to(wide)
    device = call.c_kv.device
    slots_BQ = call.positions[:, None] + torch.arange(call.c_kv.shape[1], device=device)
    outer_BQ = torch.arange(call.c_kv.shape[0], device=device)[:, None].expand_as(slots_BQ)
    if call.block_table is not None:
        outer_BQ = call.block_table.long().gather(1, slots_BQ // call.page_size)
        slots_BQ = slots_BQ % call.page_size
    call.c_kv_cache[outer_BQ, slots_BQ] = call.c_kv
    call.k_rope_cache[outer_BQ, slots_BQ] = rotated.to(call.k_rope.dtype)


def _check(*arguments: Any) -> None:
    call = _Arguments(*arguments)
    c_kv, cache = call.c_kv, call.c_kv_cache
    check_tensor(_OP, "c_kv", c_kv, "[B, Q, R]", (None, None, None))
    check_float(_OP, "c_kv", c_kv)
    batch, num_queries, rank = c_kv.shape
    check_tensor(_OP, "k_rope", call.k_rope, "[B, Q, P]", (batch, num_queries, None), c_kv)
    rope = call.k_rope.shape[2]
    if rope % 2:
        raise ValueError(f"{_OP}: k_rope: expected an even width, got {rope}")
    _check_angles(call.k_rope, call.cos, call.sin)
    paged = call.block_table is not None
    letters = ("[num_pages, page_size, R]", "[num_pages, page_size, P]") if paged else ("[B, T, R]", "[B, T, P]")
    check_tensor(_OP, "c_kv_cache", cache, letters[0], (None if paged else batch, None, rank), c_kv)
    check_tensor(_OP, "k_rope_cache", call.k_rope_cache, letters[1], (cache.shape[0], cache.shape[1], rope), c_kv)
    check_integers(_OP, "block_table", call.block_table, "[B, max_pages]", (batch, None), c_kv)
    check_integers(_OP, "positions", call.positions, "[B]", (batch,), c_kv)
    if paged and call.page_size == 0:
        raise ValueError(f"{_OP}: c_kv_cache: expected pages of at least one token, got {list(cache.shape)}")


def _check_angles(k_rope: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, num_queries, rope = k_rope.shape
    first = 1 if cos.dim() == 3 and cos.shape[0] == 1 else batch
    check_tensor(_OP, "cos", cos, "[B or 1, Q, P]", (first, num_queries, rope))
    check_tensor(_OP, "sin", sin, "[B or 1, Q, P]", (first, num_queries, rope), cos)
    if cos.dtype not in (torch.float32, k_rope.dtype):
        raise ValueError(f"{_OP}: cos: expected float32 or {k_rope.dtype} as k_rope has, got {cos.dtype}")
    if cos.device != k_rope.device:
        raise ValueError(f"{_OP}: cos: expected a tensor on {k_rope.device} as k_rope is, got {cos.device}")


def _check_data(*arguments: Any) -> None:
    """Slots within the cache or table, pages that exist."""
    call = _Arguments(*arguments)
    table, num_queries = call.block_table, call.c_kv.shape[1]
    capacity = call.page_size if table is None else table.shape[1] * call.page_size
    check_values(_OP, "positions", call.positions, 0, capacity - num_queries)
    if table is not None:
        first = call.positions.tolist()
        last = [slot + num_queries for slot in first]
        check_pages(_OP, table, first, last, call.page_size, call.c_kv_cache.shape[0])


def _kernel(*arguments: Any) -> None:
    """The op where no compiled kernel serves; on the CPU the extension is loaded by the first call."""
    if first_loaded_for(arguments[0]):
        torch.ops.xeco.rope_and_append(*arguments)
        return
    _check(*arguments)
    _check_data(*arguments)
    rope_and_append_reference(*arguments)


def _fake(*arguments: Any) -> None:
    _check(*arguments)


_LIBRARY.impl("rope_and_append", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("xeco::rope_and_append", _fake, lib=_LIBRARY)

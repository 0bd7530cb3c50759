"""The op xeco::latent_attention_packed: `latent_attention` over a cache in few bits, which is read as it lies.

Schema, reference and fake; the kernels are in csrc/latent_attention/. There is no gradient: training rounds what it caches, and
attends to that (`packed_rows.as_cached`).

Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from xeco_convert.ops._latent_attention import (
    Rule,
    check_ranges,
    check_settings,
    fake_attention,
    latent_attention_reference,
)
from xeco_convert.ops.checks import check_float, check_tensor, check_widths, run_checked
from xeco_convert.ops.extension import first_loaded_for, runs_in_reference
from xeco_convert.ops.packed_rows import (
    SCALE_BYTES,
    Bits,
    bits_obstacle,
    bits_of_layout,
    layout_number,
    layout_obstacle,
    planes_of,
    unpack_rows,
)

_OP = "latent_attention_packed"
_LIBRARY = torch.library.Library("xeco", "FRAGMENT")
_LIBRARY.define(
    "latent_attention_packed(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor? starts, Tensor? ends, "
    "Tensor? query_positions, float softmax_scale, bool causal, int window, float softcap, int latent_bits, int rope_bits) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


class _Layouts(NamedTuple):
    """The schema's last arguments: `packed_rows.layout_number` of the latents and of the rotary keys. A list of planes would be
    plainer; extensions of torch's stable interface take none from every release that this package runs on."""

    latent: int
    rope: int


def latent_attention_packed(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    *,
    latent_bits: Bits,
    rope_bits: Bits,
    softmax_scale: float,
    causal: bool = True,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`latent_attention` where c_kv and k_rope are rows of codes, as `packed_rows.pack_rows` makes them.

    c_kv uint8 [B, T, R · latent_bits / 8 + 2] and k_rope uint8 [B, T, P · rope_bits / 8 + 2], bits 8 or 4 each, or bit
    planes (6, 5, 3, 2, or how many numbers each of two to seven planes reaches); R and P even at 4 bits, multiples of 8 in
    planes; any strides, the last dimension dense. Rows of the cache stay codes: the kernels widen a tile of tokens at a time, or
    multiply integers where that is faster (AVX2, AVX-512 VNNI), which rounds queries and softmax weights to 15 bits of their
    largest number (relative error 3e-5). On a GPU codes are exact in the dtype of the queries, and scales stay float32.
    Everything else as in `latent_attention`, without gradients; raises `ValueError` where one would be needed.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_latent, q_rope)):
        raise ValueError(f"{_OP}: has no gradient: expected torch.no_grad() or detached inputs")
    rule = Rule(starts, ends, query_positions, float(softmax_scale), causal, window or 0, float(softcap or 0.0))
    layouts = (_layout("latent_bits", latent_bits, q_latent), _layout("rope_bits", rope_bits, q_rope))
    arguments = (q_latent, q_rope, c_kv, k_rope, *rule, *layouts)
    if runs_in_reference(q_latent):
        _check(*arguments)
        return latent_attention_packed_reference(*arguments)
    return cast(tuple[Tensor, Tensor], run_checked(torch.ops.xeco.latent_attention_packed, _check, arguments))


def latent_attention_packed_reference(
    q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """The op written from the formula: rows widened, then the reference of `latent_attention`, in float32 or better."""
    layouts, wide = _Layouts(*settings[-2:]), torch.promote_types(q_latent.dtype, torch.float32)
    rows = (
        unpack_rows(c_kv, bits_of_layout(layouts.latent), wide),
        unpack_rows(k_rope, bits_of_layout(layouts.rope), wide),
    )
    return latent_attention_reference(q_latent, q_rope, *rows, *settings[:-2])


def _check(q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, *settings: Any) -> None:
    layouts = _Layouts(*settings[-2:])
    check_tensor(_OP, "q_latent", q_latent, "[B, Q, H, R]", (None,) * 4)
    batch, num_queries, num_heads, rank = q_latent.shape
    check_tensor(_OP, "q_rope", q_rope, "[B, Q, H, P]", (batch, num_queries, num_heads, None), q_latent)
    check_float(_OP, "q_latent", q_latent)
    check_widths(_OP, rank, q_rope.shape[3])
    _check_rows("c_kv", c_kv, "latent_bits", layouts.latent, rank, (batch, None), q_latent)
    _check_rows("k_rope", k_rope, "rope_bits", layouts.rope, q_rope.shape[3], (batch, c_kv.shape[1]), q_latent)
    check_settings(_OP, q_latent, Rule(*settings[:-2]))


def _layout(name: str, bits: Bits, queries: Tensor) -> int:
    """The layout's number; raises `ValueError` for bits that it cannot say, before they are those of other bits."""
    obstacle = bits_obstacle(bits, queries.shape[-1])
    if obstacle is not None:
        raise ValueError(f"{_OP}: {name}: {obstacle}")
    return layout_number(bits, queries.shape[-1])


def _check_rows(
    name: str, rows: Tensor, bits_name: str, layout: int, width: int, outer: tuple[int, int | None], like: Tensor
) -> None:
    """uint8 [B, T, bytes] on the device of `like`."""
    obstacle = layout_obstacle(layout, width)
    if obstacle is not None:
        raise ValueError(f"{_OP}: {bits_name}: {obstacle}")
    planes = planes_of(bits_of_layout(layout), width)
    check_tensor(_OP, name, rows, "[B, T, bytes]", (*outer, sum(planes) // 8 + SCALE_BYTES))
    if rows.dtype != torch.uint8 or rows.device != like.device:
        raise ValueError(f"{_OP}: {name}: expected uint8 on {like.device}, got {rows.dtype} on {rows.device}")


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op where no compiled kernel serves; on the CPU the extension is loaded by the first call."""
    if first_loaded_for(arguments[0]):
        return cast(tuple[Tensor, Tensor], torch.ops.xeco.latent_attention_packed(*arguments))
    _check(*arguments)
    check_ranges(_OP, arguments[2].shape[1], *arguments[4:7])
    return latent_attention_packed_reference(*arguments)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(*arguments)
    return fake_attention(arguments[0])


def _backward(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError(f"{_OP} has no gradient; train on rows as packed_rows.as_cached gives them")


_LIBRARY.impl("latent_attention_packed", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("xeco::latent_attention_packed", _fake, lib=_LIBRARY)
torch.library.register_autograd("xeco::latent_attention_packed", _backward, lib=_LIBRARY)

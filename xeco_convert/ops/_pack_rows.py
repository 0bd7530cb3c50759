"""The op xeco::pack_rows: rows of a cache as codes with a scale, in one pass.

What the bytes are is said in packed_rows.py, whose `pack_rows` is the reference: both give the same.

Letters: B batch, Q new tokens, n numbers of a row.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from xeco_convert.ops.checks import check_float, check_tensor, run_checked
from xeco_convert.ops.extension import first_loaded_for, takes_codes
from xeco_convert.ops.packed_rows import (
    MOST_NUMBERS,
    SCALE_BYTES,
    Bits,
    bits_obstacle,
    bits_of_layout,
    layout_number,
    layout_obstacle,
    planes_of,
)
from xeco_convert.ops.packed_rows import pack_rows as pack_rows_reference

_OP = "pack_rows"
_LIBRARY = torch.library.Library("xeco", "FRAGMENT")
_LIBRARY.define("pack_rows(Tensor rows, int layout) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def pack_rows(rows: Tensor, bits: Bits) -> Tensor:
    """Rows [B, Q, n] (floating, any strides) as uint8 [B, Q, n · bits / 8 + 2], without a gradient. On a GPU plain torch
    computes, unless XECO_ATTENTION=fused takes the kernel.

    bits: 8, 4 (n even), or bit planes (n a multiple of 8): 6, 5, 3, 2, or how many numbers each of two to seven planes
    reaches. Raises `ValueError` for others.
    """
    rows, width = rows.detach(), rows.shape[-1]
    obstacle = bits_obstacle(bits, width) if width else None
    if obstacle is not None:
        raise ValueError(f"{_OP}: bits: {obstacle}")
    unasked = rows.is_cuda and not takes_codes("cuda", os.environ.get("XECO_ATTENTION"))
    if unasked or rows.dtype == torch.float64 or not 0 < width <= MOST_NUMBERS:
        return pack_rows_reference(rows, bits)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return cast(Tensor, run_checked(torch.ops.xeco.pack_rows, _check, (rows, layout_number(bits, width))))


def _check(rows: Tensor, layout: int) -> None:
    check_tensor(_OP, "rows", rows, "[B, Q, n]", (None, None, None))
    check_float(_OP, "rows", rows)
    obstacle = layout_obstacle(layout, rows.shape[-1])
    if obstacle is not None:
        raise ValueError(f"{_OP}: bits: {obstacle}")


def _kernel(rows: Tensor, layout: int) -> Tensor:
    """The op where no compiled kernel serves; on the CPU the extension is loaded by the first call."""
    if first_loaded_for(rows):
        return cast(Tensor, torch.ops.xeco.pack_rows(rows, layout))
    _check(rows, layout)
    return pack_rows_reference(rows, bits_of_layout(layout))


def _fake(rows: Tensor, layout: int) -> Tensor:
    _check(rows, layout)
    num_bytes = sum(planes_of(bits_of_layout(layout), rows.shape[-1])) // 8 + SCALE_BYTES
    return rows.new_empty((*rows.shape[:-1], num_bytes), dtype=torch.uint8)


_LIBRARY.impl(_OP, _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("xeco::pack_rows", _fake, lib=_LIBRARY)

"""Rows of a cache in 8 or 4 bits: how a latent or a rotary key becomes bytes, once for each token, and comes back.

A row x [..., n] becomes n codes of b bits and one scale s: code = round(x / s + z), x ≈ s · (code − z), z = (2^b − 1) / 2. So
zero lies between two codes, and all 2^b of them are used. The rows are expected to have been rotated (conversion folds that into
the weights), after which their numbers are spread like those of a normal distribution: one scale serves a whole row, and no
offset pays. s is the row's largest number / z, but where 4 bits would spend their codes on rare large numbers, CLIP times its rms
/ z, which loses least squared error on such rows.

Bytes of a row, uint8 [..., bytes]: with 8 bits one byte for each code, with 4 bits byte i holds code i in its low half
and code i + n / 2 in its high half; then the scale as bfloat16, low byte first.

This file is also written beside the weights of converted checkpoints, as xeco_packed_rows.py: it imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = {8: 4.0, 4: 2.75}  # largest number that has a code of its own, in units of the row's rms
SCALE_BYTES = 2
_LEAST = 2.0**-126  # scale of a row of zeros


def pack_rows(rows: Tensor, bits: int) -> Tensor:
    """Rows [..., n] (floating, any strides) as uint8 [..., n · bits / 8 + 2]; n even where bits is 4. NaN and infinity come
    back as NaN, whole rows of them."""
    if rows.shape[-1] == 0:
        return rows.new_empty(rows.shape, dtype=torch.uint8)
    values, middle = rows.float(), (2**bits - 1) / 2
    largest = values.abs().amax(dim=-1, keepdim=True)
    rms = values.square().mean(dim=-1, keepdim=True).sqrt()
    scale = (torch.minimum(largest, CLIP[bits] * rms) / middle).clamp_min(_LEAST).to(torch.bfloat16)
    codes = (values / scale.float() + middle).round().clamp(0, 2**bits - 1).nan_to_num(0).to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    return torch.cat([codes, scale.contiguous().view(torch.uint8)], dim=-1)


def unpack_rows(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The rows [..., n] that `pack_rows` made bytes of, in `dtype`."""
    if packed.shape[-1] == 0:
        return packed.to(dtype)
    codes, low, high = packed.split([packed.shape[-1] - SCALE_BYTES, 1, 1], dim=-1)
    # not a view of the two bytes: those need not lie at an even address
    scale = (low.to(torch.int32) << 16 | high.to(torch.int32) << 24).view(torch.float32)
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    rows: Tensor = (codes.to(torch.float32) - (2**bits - 1) / 2) * scale
    return rows.to(dtype)


def as_cached(rows: Tensor, bits: int) -> Tensor:
    """What the cache will give back for these rows, in their dtype. Gradients pass as if nothing had been rounded
    (straight-through estimator, arXiv 1308.3432)."""
    if bits == 16 or rows.shape[-1] == 0:
        return rows
    rounded = unpack_rows(pack_rows(rows.detach(), bits), bits, rows.dtype)
    return rows + (rounded - rows.detach()) if rows.requires_grad else rounded

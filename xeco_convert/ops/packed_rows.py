"""Rows of a cache in few bits: how a latent or a rotary key becomes bytes, once for each token, and comes back.

A row x [..., n] becomes n codes and one scale s. The rows are expected to have been rotated (conversion folds that into the
weights), after which their numbers are spread like those of a normal distribution: one scale serves a whole row, and no
offset pays. A scale that follows CLIP times the row's rms loses least squared error on such rows; but a rotary key, which nothing
may mix, can have numbers far beyond that, and there the scale follows the largest one: of the two, the one with the smaller
squared error. Three layouts, each with the scale as bfloat16 behind it, low byte first:

- 8 bits: x ≈ s · (code − 127.5), a byte for each code.
- 4 bits: x ≈ s · (code − 7.5); byte i holds code i in its low half and code i + n / 2 in its high half.
- Bit planes, for any other number of bits: plane p holds the p-th highest bit of the first w_p numbers, number i in bit i % 8 of
  byte i / 8, and w_0 = n ≥ w_1 ≥ …, all multiples of 8. A number that b planes reach has the code of b bits in the middle of
  the 2^(8−b) bytes that begin with it: x ≈ s · (byte − 128), byte = (2 · code + 1) · 2^(7−b). So numbers that count for more
  can have more bits. 6, 5, 3 and 2 bits stand for as many planes of the whole width.

No code stands for zero, so that all are used.

This file is also written beside the weights of converted checkpoints, as xeco_packed_rows.py: it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bits of each number, or how many numbers each bit plane reaches.
Bits = int | tuple[int, ...]
# Numbers of as many bits: (bits, first, end) of each run.
Runs = list[tuple[int, int, int]]

# Largest number that has a code of its own, in units of the row's rms, by bits: near the best for normal numbers.
CLIP = {1: 0.8, 2: 1.55, 3: 2.2, 4: 2.75, 5: 3.1, 6: 3.4, 7: 3.7, 8: 4.0}
MOST_PLANES = 7
MOST_NUMBERS = 127 * 8  # of a row that kernels take: seven bits say how many bytes a plane has
SCALE_BYTES = 2
_LEAST = 2.0**-126  # scale of a row of zeros


def planes_of(bits: Bits, width: int) -> tuple[int, ...]:
    """How many numbers each bit plane reaches; for rows that lie in planes."""
    return bits if isinstance(bits, tuple) else (width,) * bits


def bits_obstacle(bits: Bits, width: int) -> str | None:
    """Why no row of `width` numbers can have these bits, in words; None where one can."""
    if isinstance(bits, int):
        known, multiple = bits in (8, 6, 5, 4, 3, 2), {8: 1, 4: 2}.get(bits, 8)
    else:
        whole = all(reached % 8 == 0 and reached > 0 for reached in bits)
        known, multiple = whole and 2 <= len(bits) <= MOST_PLANES and list(bits) == sorted(bits, reverse=True), 8
    if not known:
        planes = f"how many numbers each of 2 to {MOST_PLANES} bit planes reaches, in eights and none more than the one before"
        return f"expected 8, 6, 5, 4, 3 or 2, or {planes}, got {bits}"
    if width % multiple:
        return f"expected rows of a multiple of {multiple} numbers, got {width}"
    if not isinstance(bits, int) and bits[0] != width:
        return f"expected a first bit plane that reaches every number, got {bits[0]} of {width}"
    return None


def layout_number(bits: Bits, width: int) -> int:
    """What the kernels take for `bits`: 8 and 4 themselves, else 7 bits for each plane, the multiple of 8 that it reaches. For
    bits that rows of `width` numbers, of at most MOST_NUMBERS, can have."""
    if isinstance(bits, int) and bits in (8, 4):
        return bits
    return sum(reached // 8 << 7 * number for number, reached in enumerate(planes_of(bits, width)))


def layout_obstacle(layout: int, width: int) -> str | None:
    """Why no row of `width` numbers lies so, in words; None where one does. For what comes as a layout's number."""
    if layout < 1 << 7 and layout not in (8, 4):
        return f"expected layout 8 or 4, or that of bit planes, got {layout}"
    return bits_obstacle(bits_of_layout(layout), width)


def bits_of_layout(layout: int) -> Bits:
    """The inverse of `layout_number`."""
    if layout < 1 << 7:
        return layout
    return tuple((layout >> 7 * plane & 127) * 8 for plane in range((layout.bit_length() + 6) // 7))


def classes_of(planes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Runs of numbers with as many bits: (bits, first, end), the largest number of bits first."""
    for bits in range(len(planes), 0, -1):
        first, end = planes[bits] if bits < len(planes) else 0, planes[bits - 1]
        if first < end:
            yield bits, first, end


def pack_rows(rows: Tensor, bits: Bits) -> Tensor:
    """Rows [..., n] (floating, any strides) as uint8 [..., bytes]: n even where bits is 4, a multiple of 8 in bit planes. NaN and
    infinity come back as NaN, whole rows of them."""
    if rows.shape[-1] == 0:
        return rows.new_empty(rows.shape, dtype=torch.uint8)
    numbers, scale, _ = _in_codes(_wide(rows), bits)
    codes = numbers.to(torch.uint8)
    if isinstance(bits, int) and bits in (8, 4):
        if bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | (high << 4)
    else:
        codes = _planes_of_bytes(codes, planes_of(bits, rows.shape[-1]))
    return torch.cat([codes, scale.contiguous().view(torch.uint8)], dim=-1)


def unpack_rows(packed: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """The rows [..., n] that `pack_rows` made bytes of, in `dtype`."""
    if packed.shape[-1] == 0:
        return packed.to(dtype)
    codes, low, high = packed.split([packed.shape[-1] - SCALE_BYTES, 1, 1], dim=-1)
    # not a view of the two bytes: those need not lie at an even address
    scale = (low.to(torch.int32) << 16 | high.to(torch.int32) << 24).view(torch.float32)
    middle = 127.5
    if bits == 4:
        codes, middle = torch.cat([codes & 15, codes >> 4], dim=-1), 7.5
    elif bits != 8:
        width = codes.shape[-1] * 8 // bits if isinstance(bits, int) else bits[0]
        codes, middle = _bytes_of_planes(codes, planes_of(bits, width)), 128.0
    rows: Tensor = (codes.to(torch.float32) - middle) * scale
    return rows.to(dtype)


def as_cached(rows: Tensor, bits: Bits) -> Tensor:
    """What the cache will give back for these rows, in their dtype. Gradients pass as if nothing had been rounded
    (straight-through estimator, arXiv 1308.3432)."""
    if bits == 16 or rows.shape[-1] == 0:
        return rows
    codes, scale, middle = _in_codes(_wide(rows.detach()), bits)
    rounded = ((codes - middle) * scale.float()).to(rows.dtype)
    return rows + (rounded - rows.detach()) if rows.requires_grad else rounded


def _wide(rows: Tensor) -> Tensor:
    """In float64, whose sums do not depend on their order, where there are kernels, which give the same bytes: not every other
    device has float64."""
    return rows.to(torch.float64 if rows.device.type in ("cpu", "cuda") else torch.float32)


def _in_codes(values: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor | float]:
    """Codes as float32 numbers, in bit planes those of whole bytes; the scale [..., 1]; and the code that zero would have, [n] in
    bit planes: values ≈ scale · (codes − middle)."""
    runs, in_planes = _runs_of(bits, values.shape[-1])
    middle: Tensor | float = (2 ** runs[0][0] - 1) / 2
    if in_planes:
        middle = 128.0 - _behind(runs, values.float())
    clipped, whole = (scale.clamp_min(_LEAST).to(torch.bfloat16) for scale in _scales(values, runs, in_planes))
    codes, other = (_rounded(values, scale.float(), runs, in_planes) for scale in (clipped, whole))
    lost, other_lost = (
        ((found - middle) * scale.float() - values).square().sum(dim=-1, keepdim=True)
        for found, scale in ((codes, clipped), (other, whole))
    )
    wider = other_lost < lost
    return torch.where(wider, other, codes), torch.where(wider, whole, clipped), middle


def _runs_of(bits: Bits, width: int) -> tuple[Runs, bool]:
    """Runs of numbers with as many bits, and whether they lie in bit planes."""
    if isinstance(bits, int) and bits in (8, 4):
        return [(bits, 0, width)], False
    return list(classes_of(planes_of(bits, width))), True


def _scales(values: Tensor, runs: Runs, in_planes: bool) -> tuple[Tensor, Tensor]:
    """The scales [..., 1] by CLIP and by the largest number, large enough for each run of numbers."""
    clipped, whole = [], []
    for bits, first, end in runs:
        run = values[..., first:end]
        largest, rms = run.abs().amax(dim=-1, keepdim=True), run.square().mean(dim=-1, keepdim=True).sqrt()
        most = 128 - 2.0 ** (7 - bits) if in_planes else (2**bits - 1) / 2
        clipped.append(torch.minimum(largest, CLIP[bits] * rms) / most)
        whole.append(largest / most)
    return torch.stack(clipped).amax(dim=0), torch.stack(whole).amax(dim=0)


def _rounded(values: Tensor, scale: Tensor, runs: Runs, in_planes: bool) -> Tensor:
    """The codes at a scale; in bit planes the first bits of each number's byte."""
    scaled = values.float() / scale
    if not in_planes:
        most = 2 ** runs[0][0] - 1
        plain: Tensor = (scaled + most / 2).round().clamp(0, most).nan_to_num(0)
        return plain
    codes = [
        # 2^(8−b) scales apart, of which the lowest covers what is below −128 + 2^(8−b)
        ((scaled[..., first:end] / 2 ** (8 - bits)).floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1) * 2 ** (8 - bits)
        for bits, first, end in runs
    ]
    return torch.cat(codes, dim=-1).nan_to_num(0)


def _planes_of_bytes(numbers: Tensor, planes: tuple[int, ...]) -> Tensor:
    """The bit planes of bytes [..., n], one behind the other."""
    weights = 2 ** torch.arange(8, device=numbers.device, dtype=torch.uint8)
    bits_of = [
        ((numbers[..., :reached] >> 7 - plane & 1).unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)
        for plane, reached in enumerate(planes)
    ]
    return torch.cat(bits_of, dim=-1)


def _behind(runs: Runs, like: Tensor) -> Tensor:
    """The bit behind the lowest one of each number [n]."""
    return torch.cat([like.new_full((end - first,), 1 << 7 - bits) for bits, first, end in runs])


def _bytes_of_planes(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    """The byte of each number [..., n], from the planes behind one another."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.uint8)
    numbers = torch.zeros(*codes.shape[:-1], planes[0], dtype=torch.uint8, device=codes.device)
    parts = codes.split([reached // 8 for reached in planes], dim=-1)
    for plane, (reached, part) in enumerate(zip(planes, parts, strict=True)):
        ones = (part.unsqueeze(-1) >> shifts & 1).flatten(-2)
        numbers[..., :reached] |= ones << 7 - plane
    return numbers | _behind(list(classes_of(planes)), numbers)

"""Rows of a cache in few bits: what they lose, what they keep, and how their bytes lie."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from xeco_convert.modeling.layer_xeco import row_bytes
from xeco_convert.ops.packed_rows import (
    CLIP,
    Bits,
    as_cached,
    classes_of,
    layout_number,
    pack_rows,
    planes_of,
    unpack_rows,
)

BITS = [8, 4]
PLANES: list[Bits] = [6, 3, (16, 16), (16, 16, 8, 8, 8, 8, 8), (88, 88, 80, 24, 8), (512,) * 7]
WIDTHS = [2, 6, 16, 88, 512]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(row: list[float], found: list[list[float]]) -> list[float]:
    """Of what two scales make of a row what is nearer, the first where neither is."""
    return min(found, key=lambda numbers: sum((x - y) ** 2 for x, y in zip(row, numbers, strict=True)))


def from_formula(rows: Tensor, bits: int) -> Tensor:
    """The codes' numbers one by one, in Python's own arithmetic."""
    middle = (2**bits - 1) / 2
    result = []
    for row in rows.tolist():
        largest, rms = max(map(abs, row)), (sum(x * x for x in row) / len(row)) ** 0.5
        found = []
        for reach in (min(largest, CLIP[bits] * rms), largest):
            scale = float(torch.tensor(reach / middle).to(torch.bfloat16))
            codes = [min(max(round(x / scale + middle), 0), 2**bits - 1) for x in row]
            found.append([scale * (code - middle) for code in codes])
        result.append(nearest(row, found))
    return torch.tensor(result)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_come_back_as_the_formula_has_them(bits: int, width: int) -> None:
    rows = normal(20, width) * normal(20, 1, seed=1).exp()
    found = unpack_rows(pack_rows(rows, bits), bits, torch.float32)
    expected = from_formula(rows, bits)
    # a number on the border of two codes may fall either way: by a scale at most, and rarely
    assert float((found != expected).float().mean()) < 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=float(rows.abs().max()) / (2**bits - 1) * 2.1)


def planes_from_formula(rows: Tensor, planes: tuple[int, ...]) -> Tensor:
    """The same in bit planes: number i, that b planes reach, has one of 2^b places, 2^(8-b) scales apart."""
    bits_of = [sum(reached > i for reached in planes) for i in range(planes[0])]
    result = []
    for row in rows.tolist():
        reaches = [0.0, 0.0]
        for bits in set(bits_of):
            run = [x for x, own in zip(row, bits_of, strict=True) if own == bits]
            largest, rms = max(map(abs, run)), (sum(x * x for x in run) / len(run)) ** 0.5
            for number, reach in enumerate((min(largest, CLIP[bits] * rms), largest)):
                reaches[number] = max(reaches[number], reach / (128 - 2 ** (7 - bits)))
        found = []
        for reach in reaches:
            scale = float(torch.tensor(reach).to(torch.bfloat16))
            places = []
            for x, bits in zip(row, bits_of, strict=True):
                step = scale * 2 ** (8 - bits)
                places.append(min(max(math.floor(x / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * step + step / 2)
            found.append(places)
        result.append(nearest(row, found))
    return torch.tensor(result)


@pytest.mark.parametrize("bits", PLANES)
def test_planes_come_back_as_the_formula_has_them(bits: Bits) -> None:
    width = bits[0] if isinstance(bits, tuple) else 40
    rows = normal(20, width) * normal(20, 1, seed=1).exp()
    rows[:, : width // 2] *= 1.5  # runs of other sizes
    packed = pack_rows(rows, bits)
    assert packed.shape == (20, row_bytes(width, bits, 2)) == (20, sum(planes_of(bits, width)) // 8 + 2)
    found, expected = unpack_rows(packed, bits, torch.float32), planes_from_formula(rows, planes_of(bits, width))
    assert float((found != expected).float().mean()) < 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=float(rows.abs().max()) * 2)


def test_bit_planes_lie_as_the_kernels_read_them() -> None:
    """Number i in bit i % 8 of its plane's byte i / 8, the highest bits first; then the scale."""
    places = torch.arange(-8, 8.0) + 0.5
    packed = pack_rows(places * 16, (16, 16, 16, 16, 8))
    # a scale of 1: numbers of 4 bits, 16 apart, and the first eight half as far, in 5 bits
    assert packed.tolist()[-2:] == [0x80, 0x3F]
    found = unpack_rows(packed, (16, 16, 16, 16, 8), torch.float32)
    assert found.tolist() == [*(places[:8] * 16 + 4).tolist(), *(places[8:] * 16).tolist()]
    # codes of the last eight, 8 to 15: their highest bits are all ones, the lowest every other
    assert packed.tolist()[1:8:2] == [0xFF, 0b11110000, 0b11001100, 0b10101010]
    assert packed.tolist()[8] == 0xFF  # on the border of two places: the upper one


def test_a_layout_is_one_number() -> None:
    assert layout_number(8, 24) == 8 and layout_number(4, 24) == 4
    assert layout_number(3, 24) == layout_number((24, 24, 24), 24) == 3 | 3 << 7 | 3 << 14
    assert list(classes_of((24, 24, 16, 8, 8))) == [(5, 0, 8), (3, 8, 16), (2, 16, 24)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_are_as_many_as_the_plan_counts(bits: int, width: int) -> None:
    packed = pack_rows(normal(3, width), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, row_bytes(width, bits, 2))
    assert row_bytes(width, 16, 4) == 4 * width and row_bytes(0, bits, 2) == 0


def test_bytes_lie_as_the_kernels_read_them() -> None:
    """8 bits: codes in order, 4 bits: first half low, second half high; then the scale, low byte first."""
    row = torch.tensor([-7.5, -6.5, 6.5, 7.5])
    assert pack_rows(row, 4).tolist() == [0 | 14 << 4, 1 | 15 << 4, 0x80, 0x3F]  # scale 1: bfloat16 0x3F80
    assert pack_rows(row * 17, 8).tolist() == [0, 17, 238, 255, 0x80, 0x3F]


@pytest.mark.parametrize(("bits", "lost"), [(8, 3e-4), (6, 0.0012), (4, 0.013), (3, 0.041)])
def test_normal_rows_lose_little(bits: int, lost: float) -> None:
    """Mean squared error in units of the rows' own, for widths that are too large for their largest number to set the scale."""
    for width in (64, 128, 512):
        rows = normal(2000, width)
        error = unpack_rows(pack_rows(rows, bits), bits, torch.float32) - rows
        assert float(error.square().mean()) < lost


@pytest.mark.parametrize("bits", [*BITS, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_small_and_large_numbers_come_back(bits: int, dtype: torch.dtype) -> None:
    assert not unpack_rows(pack_rows(torch.zeros(2, 8, dtype=dtype), bits), bits, dtype).abs().max() > 1e-30
    for size in (1e-4, 1.0, 1e4):
        rows = (normal(50, 32) * size).to(dtype)
        error = unpack_rows(pack_rows(rows, bits), bits, dtype).double() - rows.double()
        assert (
            float(error.square().mean().sqrt() / rows.double().square().mean().sqrt())
            < {8: 0.02, 6: 0.04, 4: 0.12}[bits]
        )


@pytest.mark.parametrize("bits", [*BITS, 3])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_not_hidden(bits: int, odd: float) -> None:
    rows = normal(3, 8)
    rows[1, 2] = odd
    found = unpack_rows(pack_rows(rows, bits), bits, torch.float32)
    assert not bool(found[1].isfinite().any())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("bits", [*BITS, 3])
def test_any_view_packs_and_unpacks_the_same(bits: int) -> None:
    wide = normal(3, 5, 20)
    rows = wide.transpose(0, 1)[1:, :, 3:11]
    packed = pack_rows(rows, bits)
    assert torch.equal(packed, pack_rows(rows.contiguous(), bits))
    odd = torch.zeros(4, 3, packed.shape[-1] + 5, dtype=torch.uint8)[..., 3:-2]  # rows that begin at odd addresses
    odd.copy_(packed)
    for view in (odd, odd[:1, :1]):
        expected = unpack_rows(packed[: view.shape[0], : view.shape[1]], bits, torch.float32)
        assert torch.equal(unpack_rows(view, bits, torch.float32), expected)


@pytest.mark.parametrize(("bits", "dtype"), itertools.product([*BITS, 3], DTYPES))
def test_what_the_cache_gives_back_has_the_gradient_of_the_rows(bits: int, dtype: torch.dtype) -> None:
    rows, weight = normal(4, 16).to(dtype), normal(4, 16, seed=3).to(dtype)
    leaf = rows.clone().requires_grad_()
    found = as_cached(leaf, bits)
    assert torch.equal(as_cached(rows, bits), unpack_rows(pack_rows(rows, bits), bits, dtype))
    torch.testing.assert_close(found.detach(), as_cached(rows, bits))
    (gradient,) = torch.autograd.grad(found, leaf, weight)
    assert torch.equal(gradient, weight)
    assert as_cached(rows, 16) is rows

"""The device kernel that packs rows, on the emulated machines and on a GPU: the bytes of the reference."""

import pytest
import torch
from emulated import Emulated
from real import Real

from xeco_convert.ops.packed_rows import Bits, pack_rows, unpack_rows

LAYOUTS: list[Bits] = [8, 4, 6, 3, (40, 40), (40, 40, 24, 24, 8, 8, 8), (40, 32, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", LAYOUTS)
def test_bytes_are_those_of_the_reference(gpu: Emulated | Real, bits: Bits, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = (torch.randn(4, 9, 100, generator=generator) * torch.randn(4, 9, 1, generator=generator).exp()).to(dtype)
    wide[0, 1] = 0
    for number in range(9):  # rows with a number that is cut off, and with one that is not
        wide[:, number, 30 + 4 * number] *= 4 * number
    for rows in (wide[1:3, ::2, 30:70], wide.transpose(0, 1)[..., 5:45], wide[:0, :, :40]):
        assert torch.equal(gpu.pack_rows(rows, bits), pack_rows(rows, bits))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", LAYOUTS)
def test_numbers_that_are_none_are_not_hidden(gpu: Emulated | Real, bits: Bits, odd: float) -> None:
    rows = torch.ones(1, 3, 40)
    rows[0, 1, 17] = odd
    found = unpack_rows(gpu.pack_rows(rows, bits), bits, torch.float32)
    assert not bool(found[0, 1].isfinite().any()) and bool(found[0, [0, 2]].isfinite().all())


@pytest.mark.parametrize("width", [2, 130, 512])
def test_rows_narrower_and_wider_than_a_block(gpu: Emulated | Real, width: int) -> None:
    rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    for bits in (8, 4):
        assert torch.equal(gpu.pack_rows(rows, bits), pack_rows(rows, bits))

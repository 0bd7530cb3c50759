"""Where the matrix instructions keep their numbers: the index functions of csrc/include/xeco/gpu/fragments.h against the
vendors' tables, written out here once more, and products of tiles on the emulated machines."""

import ctypes

import pytest
import torch


def operand_place(lanes: int, lane: int, item: int) -> tuple[int, int]:
    """(index, k) of an operand's item: matrix A of mma.m16n8k16 (PTX ISA 9.7.14.5.8), A and B of MFMA 16x16x16 (CDNA 3 ISA)."""
    if lanes == 64:
        return lane % 16, 4 * (lane // 16) + item
    group, in_group = lane >> 2, lane % 4
    row = group if item in (0, 1, 4, 5) else group + 8
    return row, in_group * 2 + (item & 1) + (0 if item < 4 else 8)


def accumulator_place(lanes: int, lane: int, item: int) -> tuple[int, int]:
    """(row, column) of a sum: C of two mma.m16n8k16 side by side; D of MFMA with its operands exchanged, so D transposed."""
    if lanes == 64:
        return lane % 16, 4 * (lane // 16) + item
    group, in_group = lane >> 2, lane % 4
    return (group if item % 4 < 2 else group + 8), in_group * 2 + (item & 1) + (0 if item < 4 else 8)


@pytest.mark.parametrize(
    ("function", "place"), [("layout_of_operand", operand_place), ("layout_of_accumulator", accumulator_place)]
)
def test_index_functions_are_the_vendors_tables(library: ctypes.CDLL, function: str, place) -> None:
    lanes = library.emulated_lanes()
    places = set()
    for lane in range(lanes):
        for item in range(256 // lanes):
            at = (ctypes.c_int64 * 2)()
            getattr(library, function)(ctypes.c_int64(lane), ctypes.c_int64(item), at)
            assert tuple(at) == place(lanes, lane, item)
            places.add(tuple(at))
    assert len(places) == 256  # every element in one lane


def product(
    library: ctypes.CDLL, left: torch.Tensor, right: torch.Tensor, *, transposed: int, again: int
) -> torch.Tensor:
    result = torch.full((16, 16), torch.nan)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (left, right)]
    flags = [ctypes.c_int64(transposed), ctypes.c_int64(again)]
    assert library.emulated_product(*pointers, *flags, ctypes.c_void_p(result.data_ptr())) == 0
    return result


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product_of_tiles_is_the_product_of_matrices(library: ctypes.CDLL, transposed: int) -> None:
    left, right = (torch.randint(-8, 9, (16, 16), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    result = product(library, left.bfloat16(), right.bfloat16(), transposed=transposed, again=0)
    assert torch.equal(result, (left @ (right if transposed else right.T)).float())


def test_a_sum_serves_as_operand_without_an_exchange(library: ctypes.CDLL) -> None:
    left, right = (torch.randint(-1, 2, (16, 16), generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    result = product(library, left.bfloat16(), right.bfloat16(), transposed=1, again=1)
    assert torch.equal(result, ((left @ right) @ right).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_widened_and_rounded_as_torch_does(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    is_half = int(dtype == torch.float16)
    for bits in range(0, 65536, 7):
        number = torch.tensor(bits - 65536 * (bits >= 32768), dtype=torch.int16).view(dtype)
        wide = library.widened(is_half, bits)
        assert torch.equal(torch.tensor(wide).nan_to_num(1e30), number.float().nan_to_num(1e30))
        if number.isnan():
            continue
        between = wide * (1 + 2**-9 + 2**-13)
        for value in (wide, between):
            expected = int(torch.tensor(value).to(dtype).view(torch.int16)) & 0xFFFF
            assert library.rounded(is_half, torch.tensor(value).item()) & 0xFFFF == expected, value

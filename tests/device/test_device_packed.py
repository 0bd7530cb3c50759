"""The device kernels over rows of codes, on the emulated machines and on a GPU, against attention in float64 over the rows that
the codes stand for."""

from typing import Any

import pytest
import torch
from emulated import Emulated
from operands import CODE_BITS as BITS
from operands import COMMON, RULES, Sizes, bits_for, finite, inputs, possible
from real import Real
from rounding import assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention
from xeco_convert.ops.packed_rows import Bits, pack_rows, unpack_rows

# Tiles of every table, parts of groups of eight, of whole tiles, and fewer tokens than a tile has.
SIZES = [
    Sizes(1, 1, 1, 16, 16),
    Sizes(2, 3, 3, 2, 2),
    Sizes(1, 200, 3, 24, 8),
    Sizes(1, 300, 32, 128, 32, 1),
    Sizes(33, 65, 2, 80, 24, 1),
    Sizes(1, 70, 20, 256, 40, 1),
    Sizes(1, 65, 3, 512, 128, 1),
    Sizes(3, 40, 24, 512, 64, 1),
    Sizes(3, 0, 3, 16, 16),
]
Machine = Emulated | Real


def packed(tensors: list[Tensor], bits: tuple[Bits, Bits]) -> list[Tensor]:
    return [*tensors[:2], pack_rows(tensors[2], bits[0]), pack_rows(tensors[3], bits[1])]


def assert_right(
    gpu: Machine, sizes: Sizes, dtype: torch.dtype, bits: tuple[Any, Any], num_splits: int = 1, **rule: Any
) -> None:
    """Codes are exact: what is rounded is what would be with rows of the dtype."""
    sizes = possible(sizes, bits)
    bits = bits_for(sizes, bits)
    tensors = inputs(sizes, dtype)
    codes = packed(tensors, bits)
    rows = [unpack_rows(codes[2], bits[0], torch.float64), unpack_rows(codes[3], bits[1], torch.float64)]
    exact = latent_attention(*(x.double() for x in tensors[:2]), *rows, softmax_scale=sizes.softmax_scale, **rule)
    out, lse = attend(gpu, codes, bits, sizes, num_splits=num_splits, **rule)
    assert torch.equal(lse == -torch.inf, exact[1] == -torch.inf)
    assert_rounded_as_predicted([out, finite(lse)], predicted([*tensors[:2], *rows], sizes, rule))


def attend(
    gpu: Machine, codes: list[Tensor], bits: tuple[Bits, Bits], sizes: Sizes, **rule: Any
) -> tuple[Tensor, Tensor]:
    settings: dict[str, Any] = {"latent_bits": bits[0], "rope_bits": bits[1], "softmax_scale": sizes.softmax_scale}
    return gpu.latent_attention_packed(*codes, **settings, **rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", SIZES)
def test_results_are_off_by_their_rounding_alone(
    gpu: Machine, sizes: Sizes, bits: tuple[Any, Any], dtype: torch.dtype
) -> None:
    assert_right(gpu, sizes, dtype, bits)


@pytest.mark.parametrize("rule", RULES)
def test_ranges_windows_positions_and_caps_are_followed(gpu: Machine, rule: str) -> None:
    assert_right(gpu, COMMON, torch.bfloat16, (4, 8), **RULES[rule])


@pytest.mark.parametrize("num_splits", [2, 5])
def test_parts_add_up(gpu: Machine, num_splits: int) -> None:
    assert_right(gpu, Sizes(1, 700, 5, 64, 16, 2), torch.bfloat16, (4, 8), num_splits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", range(4))
def test_rows_may_begin_at_any_byte(gpu: Machine, offset: int, bits: tuple[Any, Any]) -> None:
    """Rows that no query sees, and whatever lies between the others, are bytes of NaN."""
    sizes = Sizes(1, 90, 3, 32, 16, 2)
    bits = bits_for(sizes, bits)
    codes = packed(inputs(sizes, torch.bfloat16), bits)
    expected = attend(gpu, codes, bits, sizes, starts=torch.tensor([3, 20]))
    for place in (2, 3):
        width = codes[place].shape[2]
        wide = torch.full((2, 95, width + 7), 255, dtype=torch.uint8)
        view = wide[:, 2:92, offset : offset + width]
        view.copy_(codes[place])
        view[0, :3] = view[1, :20] = 255
        codes[place] = view
    for found, right in zip(attend(gpu, codes, bits, sizes, starts=torch.tensor([3, 20])), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("place", [2, 3])
def test_a_scale_that_is_no_number_is_not_hidden(gpu: Machine, place: int, bits: tuple[Any, Any]) -> None:
    sizes = COMMON
    bits = bits_for(sizes, bits)
    codes = packed(inputs(sizes, torch.bfloat16), bits)
    codes[place][1, 2, -2:] = 255
    out, lse = attend(gpu, codes, bits, sizes, causal=False)
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().any()) and bool(out[1, 2, 0].isnan().any())
    assert bool(lse[0].isfinite().all())

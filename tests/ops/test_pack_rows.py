"""pack_rows: the bytes of the reference, for every layout, dtype and view, and what is refused."""

from typing import Any

import pytest
import torch
from operands import DTYPES
from torch import Tensor

from xeco_convert.ops import pack_rows
from xeco_convert.ops import packed_rows as reference
from xeco_convert.ops.packed_rows import Bits

LAYOUTS: list[Bits] = [8, 4, 6, 3, (40, 40), (40, 40, 24, 24, 8, 8, 8), (40, 32, 8)]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", LAYOUTS)
def test_bytes_are_those_of_the_reference(bits: Bits, dtype: torch.dtype) -> None:
    rows = numbers(3, 70, 40, dtype=dtype)
    rows[0, 1], rows[1, 2, 3:] = 0, 0
    found = pack_rows(rows, bits)
    assert found.dtype == torch.uint8 and torch.equal(found, reference.pack_rows(rows, bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", LAYOUTS)
def test_a_number_far_from_the_others_is_cut_off_only_where_that_loses_less(
    bits: Bits, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of 1 to 30 times the others in one place or another: less is lost than with either scale for all rows."""
    rows = numbers(4, 60, 40, dtype=dtype)
    for row in range(60):
        rows[:, row, row % 40] *= row / 2
    found = pack_rows(rows, bits)
    assert torch.equal(found, reference.pack_rows(rows, bits))
    lost = (reference.unpack_rows(found, bits, torch.float32) - rows.float()).square().sum(dim=-1)
    only, both = [], reference._scales
    for which in (0, 1):
        monkeypatch.setattr(reference, "_scales", lambda *given, which=which: (both(*given)[which],) * 2)
        only.append((reference.as_cached(rows.float(), bits) - rows.float()).square().sum(dim=-1))
    torch.testing.assert_close(lost, torch.minimum(*only), rtol=1e-4, atol=1e-9)
    assert bool((only[0] != only[1]).any())


@pytest.mark.parametrize("bits", LAYOUTS)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_not_hidden(bits: Bits, odd: float) -> None:
    rows = numbers(1, 3, 40)
    rows[0, 1, 17] = odd
    found = reference.unpack_rows(pack_rows(rows, bits), bits, torch.float32)
    assert not bool(found[0, 1].isfinite().any()) and bool(found[0, [0, 2]].isfinite().all())


@pytest.mark.parametrize("bits", LAYOUTS)
def test_any_view_gives_the_same_bytes(bits: Bits) -> None:
    wide = numbers(4, 9, 100)
    for view in (wide[1:3, ::2, 30:70], wide.transpose(0, 1)[..., 5:45], wide[:, :, 0:80:2], wide[:0, :, :40]):
        assert torch.equal(pack_rows(view, bits), reference.pack_rows(view.contiguous(), bits))


@pytest.mark.parametrize("bits", [8, 4, 3, (2048, 2048, 64)])
def test_rows_wider_than_kernels_take_are_packed_too(bits: Bits) -> None:
    rows = numbers(1, 2, 2048)
    assert torch.equal(pack_rows(rows, bits), reference.pack_rows(rows, bits))


def test_no_gradient_passes_and_no_row_is_needed() -> None:
    assert not pack_rows(numbers(1, 2, 8).requires_grad_(), 8).requires_grad
    assert pack_rows(torch.zeros(1, 2, 0), 8).shape == (1, 2, 0)


@pytest.mark.parametrize("bits", [8, 3])
def test_the_op_is_registered_as_torch_wants_it(bits: int) -> None:
    arguments = (numbers(2, 3, 40), reference.layout_number(bits, 40))
    torch.library.opcheck(torch.ops.xeco.pack_rows.default, arguments)
    compiled = torch.compile(lambda rows: pack_rows(rows, bits), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(arguments[0]), pack_rows(arguments[0], bits))


@pytest.mark.parametrize(
    ("rows", "bits", "sentence"),
    [
        (torch.zeros(1, 2, 7), 4, "bits: expected rows of a multiple of 2 numbers, got 7"),
        (torch.zeros(1, 2, 12), 3, "bits: expected rows of a multiple of 8 numbers, got 12"),
        (torch.zeros(1, 2, 16), (8, 8), "bits: expected a first bit plane that reaches every number, got 8 of 16"),
        (torch.zeros(1, 2, 16), (16, 8, 16), r"bits: expected 8, 6, 5, 4, 3 or 2, or .*, got \(16, 8, 16\)"),
        (torch.zeros(1, 2, 24), (24, 12), r"bits: expected 8, .*, in eights .*, got \(24, 12\)"),
        (torch.zeros(1, 2, 16), 7, "bits: expected 8, 6, 5, 4, 3 or 2, or .*, got 7"),
        (torch.zeros(1, 2, 16), 16, "bits: expected 8, 6, 5, 4, 3 or 2, or .*, got 16"),
        (torch.zeros(1, 2, 16), (16,) * 8, "bits: expected 8, 6, 5, 4, 3 or 2, or .*, got"),
        (torch.zeros(1, 2, 2048), (2048, 12), "bits: expected 8, 6, 5, 4, 3 or 2, or .*, got"),
        (torch.zeros(2, 16), 8, r"rows: expected \[B, Q, n\]"),
        (torch.zeros(1, 2, 16, dtype=torch.int32), 8, "rows: expected float32, bfloat16"),
    ],
)
def test_bad_input_is_one_sentence(rows: Tensor, bits: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"pack_rows: {sentence}"):
        pack_rows(rows, bits)

"""rope_and_append on the emulated machines and on a GPU, against the reference written from the formula."""

import pytest
import torch
from emulated import Emulated, KernelStoppedError
from real import Real
from torch import Tensor

from xeco_convert.ops._rope_and_append import rope_and_append_reference

SIZES = [(2, 3, 24, 8), (1, 1, 128, 32), (3, 5, 7, 2), (2, 0, 16, 16)]  # B, Q, R, P


def operands(sizes: tuple[int, ...], dtype: torch.dtype, angles: torch.dtype, *, shared: bool) -> list[Tensor]:
    batch, queries, rank, rope = sizes
    generator = torch.Generator().manual_seed(0)
    c_kv = torch.randn(batch, queries, rank, generator=generator).to(dtype)
    k_rope = torch.randn(batch, queries, rope, generator=generator).to(dtype)
    phases = torch.randn(1 if shared else batch, queries, rope // 2, generator=generator).repeat(1, 1, 2)
    return [c_kv, k_rope, phases.cos().to(angles), phases.sin().to(angles)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_angles", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_rotated_and_written_where_they_belong(
    gpu: Emulated | Real, sizes: tuple[int, ...], dtype: torch.dtype, wide_angles: bool, shared: bool
) -> None:
    rows = operands(sizes, dtype, torch.float32 if wide_angles else dtype, shared=shared)
    result, expected = ([torch.zeros(sizes[0], 11, width, dtype=dtype) for width in sizes[2:]] for _ in range(2))
    positions = torch.tensor([4, 0, 6])[: sizes[0]]
    gpu.rope_and_append(*rows, *result, positions=positions)
    rope_and_append_reference(*rows, *expected, None, positions)
    assert torch.equal(result[0], expected[0])
    # one rounding of a sum of two products: fused multiply-add may move it by one place
    torch.testing.assert_close(result[1], expected[1], rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_pages_are_found_by_the_table(gpu: Emulated | Real) -> None:
    sizes = (2, 5, 24, 8)
    rows = operands(sizes, torch.bfloat16, torch.float32, shared=False)
    result, expected = ([torch.zeros(6, 4, width, dtype=torch.bfloat16) for width in sizes[2:]] for _ in range(2))
    table, positions = torch.tensor([[5, 0, 3], [-1, 2, 1]], dtype=torch.int32), torch.tensor([2, 7])
    gpu.rope_and_append(*rows, *result, positions=positions, block_table=table)
    rope_and_append_reference(*rows, *expected, table, positions)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)
        assert torch.equal(one == 0, other == 0)


@pytest.mark.parametrize(("position", "page"), [(9, 0), (-1, 0), (0, 7)])
def test_slots_and_pages_that_do_not_exist_stop_the_kernel(emulated: Emulated, position: int, page: int) -> None:
    rows = operands((1, 2, 16, 16), torch.bfloat16, torch.float32, shared=True)
    caches = [torch.zeros(4, 5, 16, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.tensor([[page, 1]], dtype=torch.int32)
    with pytest.raises(KernelStoppedError):
        emulated.rope_and_append(*rows, *caches, positions=torch.tensor([position]), block_table=table)

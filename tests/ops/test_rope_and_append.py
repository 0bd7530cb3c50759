"""rope_and_append on every kernel: the formula, contiguous and paged caches, and nothing else is touched."""

import pytest
import torch
from operands import DTYPES
from torch import Tensor

from xeco_convert.ops import rope_and_append

pytestmark = pytest.mark.usefixtures("level")
SHAPES = [(1, 1, 16, 16), (2, 5, 24, 8), (3, 1, 512, 128), (2, 129, 7, 2), (2, 0, 16, 16), (0, 3, 16, 16)]


def operands(batch: int, queries: int, rank: int, rope: int, dtype: torch.dtype, angles: torch.dtype) -> list[Tensor]:
    """c_kv, k_rope, cos, sin; the two halves of the angles differ, so that none can stand for the other."""
    generator = torch.Generator().manual_seed(rank + queries)
    c_kv = torch.randn(batch, queries, rank, generator=generator).to(dtype)
    k_rope = torch.randn(batch, queries, rope, generator=generator).to(dtype)
    phase = torch.rand(batch, queries, rope, generator=generator, dtype=torch.float64) * 6
    return [c_kv, k_rope, phase.cos().to(angles), phase.sin().to(angles)]


def by_hand(k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float64, pair by pair."""
    half = k_rope.shape[-1] // 2
    first, second = k_rope[..., :half].double(), k_rope[..., half:].double()
    cos, sin = cos.double(), sin.double()
    return torch.cat(
        [
            first * cos[..., :half] - second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
        ],
        dim=-1,
    )


def empty_cache(batch: int, tokens: int, rank: int, rope: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((batch, tokens, width), torch.nan, dtype=dtype) for width in (rank, rope)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("wide_angles", [True, False])
@pytest.mark.usefixtures("threads")
def test_latents_and_rotated_keys_lie_where_they_belong(
    shape: tuple[int, int, int, int], dtype: torch.dtype, wide_angles: bool
) -> None:
    batch, queries, rank, rope = shape
    c_kv, k_rope, cos, sin = operands(*shape, dtype, torch.float32 if wide_angles else dtype)
    caches = empty_cache(batch, queries + 9, rank, rope, dtype)
    positions = torch.arange(batch) * 3
    rope_and_append(c_kv, k_rope, cos, sin, *caches, positions=positions)
    written = torch.zeros(batch, queries + 9, dtype=torch.bool)
    for b in range(batch):
        here = slice(int(positions[b]), int(positions[b]) + queries)
        written[b, here] = True
        assert torch.equal(caches[0][b, here], c_kv[b])
        expected = by_hand(k_rope[b], cos[b], sin[b]).to(dtype)
        # float32 products and one rounding: at most one unit in the last place of the larger term
        torch.testing.assert_close(caches[1][b, here], expected, rtol=torch.finfo(dtype).eps, atol=4e-7)
    assert all(bool(cache[~written].isnan().all()) for cache in caches)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_paged_cache_holds_the_same(page_size: int, dtype: torch.dtype) -> None:
    batch, queries, rank, rope = 2, 5, 24, 8
    tensors = operands(batch, queries, rank, rope, dtype, torch.float32)
    positions, tokens = torch.tensor([3, 9]), 16
    flat = empty_cache(batch, tokens, rank, rope, dtype)
    rope_and_append(*tensors, *flat, positions=positions)
    per_sequence = -(-tokens // page_size)
    table = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = table.view(batch, per_sequence)
    pages = empty_cache(batch * per_sequence, page_size, rank, rope, dtype)
    rope_and_append(*tensors, *pages, positions=positions, block_table=table)
    for cache, paged in zip(flat, pages, strict=True):
        laid_out = paged[table.long()].flatten(1, 2)[:, :tokens]
        assert torch.equal(laid_out.nan_to_num(99), cache.nan_to_num(99))


def test_one_row_of_angles_serves_all_sequences() -> None:
    c_kv, k_rope, cos, sin = operands(3, 4, 16, 8, torch.float32, torch.float32)
    once, each = empty_cache(3, 4, 16, 8, torch.float32), empty_cache(3, 4, 16, 8, torch.float32)
    positions = torch.zeros(3, dtype=torch.int64)
    rope_and_append(c_kv, k_rope, cos[:1], sin[:1], *once, positions=positions)
    angles = [x[:1].expand(3, -1, -1) for x in (cos, sin)]
    rope_and_append(c_kv, k_rope, *angles, *each, positions=positions)
    assert all(torch.equal(one, other) for one, other in zip(once, each, strict=True))


def test_strided_inputs_and_caches_are_read_and_written_in_place() -> None:
    batch, queries, rank, rope = 2, 3, 16, 8
    c_kv, k_rope, cos, sin = operands(batch, queries, rank, rope, torch.float32, torch.float32)
    together = torch.cat([c_kv, k_rope], dim=-1)
    buffer = torch.zeros(batch, 2, 10, rank + rope)
    positions = torch.tensor([1, 6])
    rope_and_append(
        together[..., :rank],
        together[..., rank:],
        cos,
        sin,
        buffer[:, 1, :, :rank],
        buffer[:, 1, :, rank:],
        positions=positions,
    )
    expected = [torch.zeros(batch, 10, width) for width in (rank, rope)]
    rope_and_append(c_kv, k_rope, cos, sin, *expected, positions=positions)
    assert torch.equal(buffer[:, 1], torch.cat(expected, dim=-1)) and not buffer[:, 0].any()


@pytest.mark.on_host
@pytest.mark.parametrize("positions", [[-1, 0], [0, 7], [0, 2**62]])
def test_slots_outside_the_cache_are_refused_and_nothing_is_written(positions: list[int]) -> None:
    tensors, caches = operands(2, 4, 16, 8, torch.float32, torch.float32), empty_cache(2, 10, 16, 8, torch.float32)
    for call in (rope_and_append, lambda *a, positions: torch.ops.xeco.rope_and_append(*a, None, positions)):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"rope_and_append: positions: expected values from 0 to 6"
        ):
            call(*tensors, *caches, positions=torch.tensor(positions))
        assert all(bool(cache.isnan().all()) for cache in caches)


@pytest.mark.on_host
@pytest.mark.parametrize("page", [-1, 5, 2**31 - 1])
def test_pages_that_do_not_exist_are_refused_and_nothing_is_written(page: int) -> None:
    tensors, pages = operands(2, 4, 16, 8, torch.float32, torch.float32), empty_cache(5, 4, 16, 8, torch.float32)
    table = torch.tensor([[0, 1, 2], [3, page, 4]], dtype=torch.int32)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"block_table: expected pages from 0 to 4, got .* at \[1, 1\]"
    ):
        rope_and_append(*tensors, *pages, positions=torch.tensor([0, 2]), block_table=table)
    assert all(bool(cache.isnan().all()) for cache in pages)


def test_gradients_are_refused() -> None:
    tensors, caches = operands(2, 4, 16, 8, torch.float32, torch.float32), empty_cache(2, 10, 16, 8, torch.float32)
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="rope_and_append: has no gradient"):
        rope_and_append(*tensors, *caches, positions=torch.tensor([0, 0]))

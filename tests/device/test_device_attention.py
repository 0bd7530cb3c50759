"""Whole device kernels of latent attention, on the emulated machines and on a GPU: forward, decode and backward against
float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import Emulated, KernelStoppedError
from operands import COMMON, RULES, Sizes, finite, inputs
from real import Real
from rounding import assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention

# 0 and 1 tokens, tiles that are not full, every tile of the tables (rows up to 16, 32 and more; R up to 64, 128, 256, 512)
SIZES = [
    Sizes(1, 1, 1, 16, 16),
    Sizes(3, 0, 3, 16, 16),
    Sizes(2, 3, 3, 1, 2),
    Sizes(1, 200, 3, 24, 8),
    Sizes(5, 129, 3, 7, 2, 1),
    Sizes(1, 150, 32, 128, 32, 1),
    Sizes(33, 65, 2, 80, 24, 1),
    Sizes(4, 70, 3, 160, 64, 1),
    Sizes(1, 70, 20, 256, 16, 1),
    Sizes(7, 40, 10, 192, 48, 1),
    Sizes(1, 65, 3, 512, 128, 1),
    Sizes(1, 40, 30, 320, 64, 1),
    Sizes(3, 40, 24, 512, 64, 1),
    Sizes(0, 7, 3, 16, 16),
    Sizes(2, 3, 3, 16, 16, 0),
]
DTYPES = [torch.bfloat16, torch.float16]
Machine = Emulated | Real


def exact_of(tensors: list[Tensor], sizes: Sizes, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return latent_attention(*(x.double() for x in tensors), softmax_scale=sizes.softmax_scale, **rule)


def assert_forward(gpu: Machine, sizes: Sizes, dtype: torch.dtype, rule: dict[str, Any]) -> None:
    tensors = inputs(sizes, dtype)
    result = gpu.latent_attention(*tensors, softmax_scale=sizes.softmax_scale, **rule)
    exact = exact_of(tensors, sizes, rule)
    assert torch.equal(result[1] == -torch.inf, exact[1] == -torch.inf)
    assert_rounded_as_predicted([result[0], finite(result[1])], predicted(tensors, sizes, rule))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_results_are_off_by_their_rounding_alone(gpu: Machine, sizes: Sizes, dtype: torch.dtype) -> None:
    assert_forward(gpu, sizes, dtype, {})


@pytest.mark.parametrize("rule", RULES)
def test_forward_follows_ranges_windows_positions_and_caps(gpu: Machine, rule: str) -> None:
    assert_forward(gpu, COMMON, torch.bfloat16, RULES[rule])


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_any_number_of_stages_gives_the_result(gpu: Machine, stages: int) -> None:
    sizes = Sizes(1, 400, 17, 32, 16, 1)
    assert_forward(replace(gpu, max_stages=stages), sizes, torch.bfloat16, {"starts": torch.tensor([3])})


@pytest.mark.parametrize(
    ("fixed", "each", "expected"),
    [
        (20, 10, 4),  # two blocks have room for four
        (20, 20, 3),  # two blocks have room for three
        (20, 30, 2),  # two blocks have room for two
        (20, 31, 4),  # a block is alone anyhow
        (20, 45, 3),
        (20, 80, 1),
    ],
)
def test_stages_fill_what_a_second_block_cannot_use(emulated: Emulated, fixed: int, each: int, expected: int) -> None:
    """In KB, of 163 KB. Copies through registers (MFMA) have one stage."""
    result = emulated.stages_of_block(fixed * 1024, each * 1024)
    assert result == (expected if emulated.library.emulated_lanes() == 32 else 1)


H100 = 227 * 1024  # bytes of shared memory that a block may have


@pytest.mark.parametrize(
    ("sizes", "rows", "resident"),
    [
        (Sizes(1, 64, 32, 128, 32), 32, 2),
        (Sizes(1, 64, 32, 128, 64), 32, 2),  # with tiles of half as many tokens
        (Sizes(1, 64, 32, 256, 64), 32, 2),
        (Sizes(1, 64, 32, 512, 64), 32, 1),
        (Sizes(1, 64, 16, 128, 32), 16, 2),
        (Sizes(9, 64, 32, 128, 32), 64, 2),
    ],
)
def test_an_h100_holds_as_many_blocks_as_its_tiles_were_measured_with(
    emulated: Emulated, sizes: Sizes, rows: int, resident: int
) -> None:
    if emulated.library.emulated_lanes() == 32:
        machine = replace(emulated, max_shared_bytes=H100)
        assert machine.blocks_of_forward(*inputs(sizes, torch.bfloat16)) == (rows, resident)


@pytest.mark.parametrize("rank", [64, 128, 256, 512])
def test_the_tiles_of_an_h100_give_the_result(gpu: Machine, rank: int) -> None:
    machine = replace(gpu, max_shared_bytes=max(gpu.max_shared_bytes, H100))
    assert_forward(machine, Sizes(1, 150, 24, rank, 32, 1), torch.bfloat16, {})


@pytest.mark.parametrize("sizes", [Sizes(3, 40, 24, 512, 64, 1), Sizes(7, 40, 10, 256, 64, 1)])
def test_a_machine_with_less_shared_memory_takes_smaller_tiles(gpu: Machine, sizes: Sizes) -> None:
    small = replace(gpu, max_shared_bytes=min(gpu.max_shared_bytes, 99 * 1024))
    assert_forward(small, sizes, torch.bfloat16, {})
    assert_backward(small, sizes, torch.bfloat16, {})


@pytest.mark.parametrize("width", [32, 40])
def test_views_into_one_buffer_are_read_in_place(gpu: Machine, width: int) -> None:
    """Latent and rotary part side by side, rows on 16 bytes or not; queries with the heads first."""
    sizes = Sizes(3, 70, 5, 24, 8, 2)
    tensors = inputs(sizes, torch.bfloat16)
    buffer = torch.full((2, 70, width + 1 if width == 40 else width), torch.nan, dtype=torch.bfloat16)
    buffer[..., :24], buffer[..., 24:32] = tensors[2], tensors[3]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:2]]
    result = gpu.latent_attention(*strided, buffer[..., :24], buffer[..., 24:32], softmax_scale=sizes.softmax_scale)
    expected = gpu.latent_attention(*tensors, softmax_scale=sizes.softmax_scale)
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)


def poisoned(tensors: list[Tensor], first: list[int], last: list[int]) -> list[Tensor]:
    for rows in tensors[2:]:
        for b in range(rows.shape[0]):
            rows[b, : first[b]] = torch.nan
            rows[b, last[b] :] = torch.nan
    return tensors


UNSEEN = [
    ({"starts": torch.tensor([5, 60]), "ends": torch.tensor([100, 61])}, [5, 60], [100, 61]),
    ({"query_positions": torch.tensor([20, -3])}, [0, 0], [27, 4]),
    ({"window": 9, "query_positions": torch.tensor([90, 30])}, [82, 22], [97, 37]),
]


@pytest.mark.parametrize(("rule", "first", "last"), UNSEEN)
def test_rows_that_no_query_sees_are_not_read(
    gpu: Machine, rule: dict[str, Any], first: list[int], last: list[int]
) -> None:
    clean, scale = inputs(COMMON, torch.bfloat16), COMMON.softmax_scale
    dirty = poisoned(inputs(COMMON, torch.bfloat16), first, last)
    result, expected = (gpu.latent_attention(*x, softmax_scale=scale, **rule) for x in (dirty, clean))
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)
    results = [
        gpu.latent_attention_backward(clean[0], None, x, *expected, softmax_scale=scale, **rule) for x in (dirty, clean)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    for b in range(2):
        assert results[0][2][b, : first[b]].count_nonzero() == 0 and results[0][3][b, last[b] :].count_nonzero() == 0


def test_nan_in_a_row_that_is_seen_reaches_the_result(gpu: Machine) -> None:
    tensors = inputs(COMMON, torch.bfloat16)
    tensors[2][0, 0, 0] = torch.nan
    out, lse = gpu.latent_attention(*tensors, softmax_scale=COMMON.softmax_scale)
    assert out[0].isnan().all(-1).all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


# Decode


def decode_rule(options: dict[str, Any], queries: int) -> dict[str, Any]:
    rule = {name: value for name, value in options.items() if name != "lengths"}
    if "lengths" in options:
        rule["ends"], rule["query_positions"] = options["lengths"], options["lengths"] - queries
    return rule


DECODE: dict[str, dict[str, Any]] = {
    "all": {},
    "lengths": {"lengths": torch.tensor([129, 60])},
    "an empty sequence": {"lengths": torch.tensor([0, 129])},
    "shorter than the queries": {"lengths": torch.tensor([3, 8])},
    "left padding and window": {"lengths": torch.tensor([129, 100]), "starts": torch.tensor([5, 99]), "window": 70},
    "soft-cap": {"softcap": 0.9, "starts": torch.tensor([0, 64])},
}


@pytest.mark.parametrize("options", DECODE)
@pytest.mark.parametrize("num_splits", [1, 3, 20])
def test_decode_follows_lengths_in_any_number_of_splits(gpu: Machine, options: str, num_splits: int) -> None:
    sizes = COMMON
    tensors, rule = inputs(sizes, torch.bfloat16), decode_rule(DECODE[options], sizes.Q)
    result = gpu.latent_attention_decode(
        *tensors, softmax_scale=sizes.softmax_scale, num_splits=num_splits, **DECODE[options]
    )
    exact = exact_of(tensors, sizes, rule)
    assert torch.equal(result[1] == -torch.inf, exact[1] == -torch.inf)
    assert_rounded_as_predicted([result[0], finite(result[1])], predicted(tensors, sizes, rule))


def paged(rows: list[Tensor], lengths: Tensor, page_size: int) -> tuple[list[Tensor], Tensor]:
    """The same cache in pages in any order; what holds no token of a sequence is NaN, unused entries name no page."""
    used = [-(-int(length) // page_size) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.full((rows[0].shape[0], max(used) + 1), -7, dtype=torch.int32)
    pages = [torch.full((len(order), page_size, x.shape[-1]), torch.nan, dtype=x.dtype) for x in rows]
    for b, count in enumerate(used):
        for i in range(count):
            table[b, i] = order.pop()
            last = min((i + 1) * page_size, int(lengths[b]))
            for page, row in zip(pages, rows, strict=True):
                page[table[b, i], : last - i * page_size] = row[b, i * page_size : last]
    return pages, table


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_paged_cache_gives_what_a_contiguous_one_gives(gpu: Machine, page_size: int, num_splits: int) -> None:
    sizes = Sizes(2, 129, 3, 24, 8)
    q_latent, q_rope, *rows = inputs(sizes, torch.bfloat16)
    for lengths in (torch.tensor([129, 65]), torch.tensor([0, 64])):
        pages, table = paged(rows, lengths, page_size)
        options: dict[str, Any] = {"softmax_scale": sizes.softmax_scale, "lengths": lengths, "num_splits": num_splits}
        expected = gpu.latent_attention_decode(q_latent, q_rope, *rows, **options)
        result = gpu.latent_attention_decode(q_latent, q_rope, *pages, block_table=table, **options)
        for one, other in zip(result, expected, strict=True):
            assert torch.equal(one, other)


def test_a_page_that_does_not_exist_stops_the_kernel(emulated: Emulated) -> None:
    q_latent, q_rope, *rows = inputs(Sizes(1, 64, 3, 16, 16, 1), torch.bfloat16)
    pages, table = paged(rows, torch.tensor([64]), 16)
    table[0, 2] = 1000
    with pytest.raises(KernelStoppedError):
        emulated.latent_attention_decode(
            q_latent, q_rope, *pages, softmax_scale=0.1, block_table=table, lengths=torch.tensor([64])
        )


@pytest.mark.parametrize("rule", [{"ends": torch.tensor([130, 3])}, {"starts": torch.tensor([-1, 0])}])
def test_a_range_beyond_the_cache_stops_the_kernel(emulated: Emulated, rule: dict[str, Any]) -> None:
    with pytest.raises(KernelStoppedError):
        emulated.latent_attention(*inputs(COMMON, torch.bfloat16), softmax_scale=0.1, **rule)


# Backward


def assert_backward(gpu: Machine, sizes: Sizes, dtype: torch.dtype, rule: dict[str, Any]) -> None:
    tensors = inputs(sizes, dtype)
    generator = torch.Generator().manual_seed(7)
    d_out = torch.randn(tensors[0].shape, generator=generator).to(dtype)
    d_lse = torch.randn(sizes.B, sizes.H, sizes.Q, generator=generator)
    options = {"softmax_scale": sizes.softmax_scale, **rule}
    out, lse = gpu.latent_attention(*tensors, **options)
    result = gpu.latent_attention_backward(d_out, d_lse, tensors, out, lse, **options)
    assert_rounded_as_predicted(result, predicted(tensors, sizes, rule, d_out, d_lse)[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_off_by_their_rounding_alone(gpu: Machine, sizes: Sizes, dtype: torch.dtype) -> None:
    assert_backward(gpu, sizes, dtype, {})


@pytest.mark.parametrize("rule", RULES)
def test_gradients_follow_ranges_windows_positions_and_caps(gpu: Machine, rule: str) -> None:
    assert_backward(gpu, COMMON, torch.bfloat16, RULES[rule])


@pytest.mark.parametrize("num_groups", [2, 3, 16])
def test_any_number_of_groups_of_query_rows_gives_the_gradient(gpu: Machine, num_groups: int) -> None:
    assert_backward(replace(gpu, num_groups=num_groups), Sizes(33, 65, 5, 40, 24, 1), torch.bfloat16, {"window": 20})

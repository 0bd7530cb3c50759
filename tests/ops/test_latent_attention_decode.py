"""latent_attention_decode on every kernel: contiguous and paged caches, splits, what must not be read."""

from typing import Any

import pytest
import torch
from operands import COMMON, DTYPES, Sizes, finite, inputs
from rounding import assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_decode
from xeco_convert.ops._latent_attention_decode import latent_attention_decode_reference

pytestmark = pytest.mark.usefixtures("level")

CASES = [
    Sizes(1, 1, 1, 16, 16),
    Sizes(1, 129, 32, 128, 32, 1),
    Sizes(1, 3000, 5, 64, 16),
    Sizes(1, 1300, 11, 24, 8, 1),
    Sizes(3, 700, 3, 24, 8),
    Sizes(1, 0, 3, 16, 16),
    Sizes(0, 9, 3, 16, 16),
    Sizes(1, 65, 2, 512, 64),
    Sizes(4, 7, 3, 7, 2),
    Sizes(1, 9, 3, 16, 16, 0),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "lengths": {"lengths": torch.tensor([129, 60])},
    "an empty sequence": {"lengths": torch.tensor([0, 129])},
    "shorter than the queries": {"lengths": torch.tensor([3, 8])},
    "left padding": {"lengths": torch.tensor([129, 100]), "starts": torch.tensor([5, 99])},
    "window": {"lengths": torch.tensor([129, 60]), "window": 13},
    "soft-cap": {"softcap": 0.9, "starts": torch.tensor([0, 64])},
}


def decode(tensors: list[Tensor], sizes: Sizes, **options: Any) -> tuple[Tensor, Tensor]:
    return latent_attention_decode(*tensors, softmax_scale=sizes.softmax_scale, **options)


def as_rule(options: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The same as options of latent_attention."""
    rule = {name: value for name, value in options.items() if name not in ("lengths", "num_splits")}
    if "lengths" in options:
        rule["ends"], rule["query_positions"] = options["lengths"], options["lengths"] - sizes.Q
    return rule


def assert_right(sizes: Sizes, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = inputs(sizes, dtype)
    out, lse = decode(tensors, sizes, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact = decode([tensor.double() for tensor in tensors], sizes, **options)
    assert torch.equal(lse == -torch.inf, exact[1] == -torch.inf)
    assert_rounded_as_predicted([out, finite(lse)], predicted(tensors, sizes, as_rule(options, sizes)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.usefixtures("threads")
def test_results_are_off_by_their_rounding_alone(sizes: Sizes, dtype: torch.dtype) -> None:
    assert_right(sizes, dtype, {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("queries", [1, 7])
def test_lengths_paddings_windows_and_caps_are_followed(options: str, dtype: torch.dtype, queries: int) -> None:
    assert_right(COMMON._replace(Q=queries), dtype, OPTIONS[options])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [3, 5])
def test_any_number_of_splits_gives_the_result(num_splits: int, dtype: torch.dtype, heads: int) -> None:
    """With 8 rows or fewer, which 8-lane kernels compute where there are wider ones too, and with more."""
    options = {"lengths": torch.tensor([700, 60]), "starts": torch.tensor([100, 50]), "num_splits": num_splits}
    assert_right(Sizes(2, 700, heads, 32, 16), dtype, options)


def test_decode_is_latent_attention_at_the_end_of_the_cache() -> None:
    tensors = inputs(COMMON)
    lengths = torch.tensor([100, 129])
    found = decode(tensors, COMMON, lengths=lengths)
    expected = latent_attention(
        *tensors, softmax_scale=COMMON.softmax_scale, ends=lengths, query_positions=lengths - COMMON.Q
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def paged(rows: list[Tensor], lengths: Tensor, page_size: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """The same cache in pages that lie in any order, among others; whatever holds no token of a sequence is NaN, and table
    entries that hold none are no page at all."""
    batch, tokens = rows[0].shape[:2]
    max_pages = -(-tokens // page_size) + 1
    used = [-(-int(length) // page_size) for length in lengths]
    order = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((batch, max_pages), -7, dtype=torch.int32)
    pages = [torch.full((len(order), page_size, x.shape[-1]), torch.nan, dtype=x.dtype) for x in rows]
    for b in range(batch):
        for i in range(used[b]):
            number, first = order.pop(), i * page_size
            table[b, i] = number
            last = min(first + page_size, int(lengths[b]))
            for page, row in zip(pages, rows, strict=True):
                page[number, : last - first] = row[b, first:last]
    return pages, table


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_paged_cache_gives_what_a_contiguous_one_gives(page_size: int, dtype: torch.dtype, queries: int) -> None:
    sizes = Sizes(queries, 129, 3, 24, 8)
    q_latent, q_rope, *rows = inputs(sizes, dtype)
    for lengths in (torch.tensor([129, 65]), torch.tensor([1, 128]), torch.tensor([0, 64])):
        pages, table = paged(rows, lengths, page_size)
        for options in ({}, {"window": 20}, {"starts": lengths // 3}, {"num_splits": 3}):
            expected = decode([q_latent, q_rope, *rows], sizes, lengths=lengths, **options)
            found = decode([q_latent, q_rope, *pages], sizes, lengths=lengths, block_table=table, **options)
            # pages cut the cache into other tiles, so that sums are rounded in another order: a few units in the last place
            for one, other in zip(found, expected, strict=True):
                eps = torch.finfo(one.dtype).eps
                torch.testing.assert_close(one, other, rtol=4 * eps, atol=4 * eps)


def test_pages_may_be_views_of_one_buffer() -> None:
    sizes = Sizes(1, 129, 3, 24, 8)
    q_latent, q_rope, *rows = inputs(sizes)
    lengths = torch.tensor([129, 65])
    pages, table = paged(rows, lengths, 16)
    buffer = torch.cat(pages, dim=-1)
    found = decode([q_latent, q_rope, buffer[..., :24], buffer[..., 24:]], sizes, lengths=lengths, block_table=table)
    expected = decode([q_latent, q_rope, *pages], sizes, lengths=lengths, block_table=table)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_table_may_be_a_view_of_a_larger_one() -> None:
    sizes = Sizes(1, 129, 3, 24, 8)
    q_latent, q_rope, *rows = inputs(sizes)
    lengths = torch.tensor([129, 65])
    pages, table = paged(rows, lengths, 16)
    wide = torch.cat([table, torch.full_like(table, 10**6)], dim=1)[:, : table.shape[1]]
    found = decode([q_latent, q_rope, *pages], sizes, lengths=lengths, block_table=wide)
    expected = decode([q_latent, q_rope, *pages], sizes, lengths=lengths, block_table=table)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_before_the_start_and_behind_the_length_are_not_read(options: str, dtype: torch.dtype) -> None:
    tensors, given = inputs(COMMON, dtype), OPTIONS[options]
    token = torch.arange(COMMON.T)
    hidden = token >= given.get("lengths", torch.tensor([COMMON.T] * 2))[:, None]
    hidden = hidden | (token < given.get("starts", torch.zeros(2))[:, None])
    poisoned = [*tensors[:2], *(rows.masked_fill(hidden.unsqueeze(-1), torch.nan) for rows in tensors[2:])]
    for found, right in zip(decode(poisoned, COMMON, **given), decode(tensors, COMMON, **given), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_runs_on_one_and_two_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    sizes, before = Sizes(1, 5000, 8, 32, 16), torch.get_num_threads()
    tensors = inputs(sizes, dtype)
    expected = decode(tensors, sizes)
    try:
        for number in range(20):
            torch.set_num_threads(1 + number % 2)
            assert all(torch.equal(one, other) for one, other in zip(decode(tensors, sizes), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_reference_lays_pages_side_by_side() -> None:
    sizes = Sizes(2, 33, 3, 8, 4)
    q_latent, q_rope, *rows = inputs(sizes, torch.float64)
    lengths = torch.tensor([33, 10])
    pages, table = paged(rows, lengths, 8)
    rule = (None, lengths, sizes.softmax_scale, 0, 0.0, 0)
    found = latent_attention_decode_reference(q_latent, q_rope, *pages, table, *rule)
    expected = latent_attention_decode_reference(q_latent, q_rope, *rows, None, *rule)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_gradients_are_refused() -> None:
    tensors = inputs(COMMON)
    tensors[2].requires_grad_()
    with pytest.raises(ValueError, match=r"latent_attention_decode: has no gradient: .*use latent_attention to train"):
        decode(tensors, COMMON)
    with torch.no_grad():
        assert not decode(tensors, COMMON)[0].requires_grad
    out, _ = torch.ops.xeco.latent_attention_decode(*tensors, None, None, None, 0.3, 0, 0.0, 0)
    with pytest.raises(RuntimeError, match="has no gradient; use latent_attention to train"):
        out.sum().backward()

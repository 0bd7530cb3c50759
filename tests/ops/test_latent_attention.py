"""latent_attention, forward and backward, on every kernel: against float64, awkward sizes, what must not be read, strides."""

from typing import Any

import pytest
import torch
from operands import COMMON, DTYPES, RULES, SIZES, Sizes, finite, inputs, schema_order
from rounding import assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention
from xeco_convert.ops._latent_attention import visible_tokens

pytestmark = pytest.mark.usefixtures("level")


def run(tensors: list[Tensor], sizes: Sizes, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return latent_attention(*tensors, softmax_scale=sizes.softmax_scale, **rule)


def with_gradients(function: Any, tensors: list[Tensor], *arguments: Any) -> list[Tensor]:
    """out, lse and the gradients of a fixed function of both."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = function(leaves, *arguments)
    lse = finite(lse)
    return [out, lse, *torch.autograd.grad([out, lse], leaves, factors_of(out, lse))]


def factors_of(out: Tensor, lse: Tensor) -> list[Tensor]:
    """Fixed gradients of both, in their dtypes."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse)]


def assert_right(sizes: Sizes, rule: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = inputs(sizes, dtype)
    found = with_gradients(run, tensors, sizes, rule)
    assert {x.dtype for x in found} <= {dtype, torch.float32} and found[1].dtype == torch.float32
    assert_rounded_as_predicted(found, predicted(tensors, sizes, rule, *factors_of(*found[:2])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.usefixtures("threads")
def test_results_and_gradients_are_off_by_their_rounding_alone(sizes: Sizes, dtype: torch.dtype) -> None:
    assert_right(sizes, {}, dtype)


@pytest.mark.parametrize("rank", [16, 32, 96, 160, 256, 384, 448])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_is_served(rank: int, dtype: torch.dtype) -> None:
    assert_right(Sizes(3, 19, 2, rank, 32, 1), {}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_what_is_seen_is_followed(rule: str, dtype: torch.dtype) -> None:
    assert_right(COMMON, RULES[rule], dtype)


@pytest.mark.parametrize("sizes", [Sizes(60, 300, 2, 32, 16), Sizes(300, 300, 3, 16, 16, 1)])
@pytest.mark.parametrize("rule", [{}, {"window": 70}, {"starts": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges_that_begin_and_end_inside_tiles_are_followed(
    sizes: Sizes, rule: dict[str, Any], dtype: torch.dtype
) -> None:
    if "starts" in rule:
        rule = {"starts": torch.arange(sizes.B) * 40 + 33, "ends": 290 - torch.arange(sizes.B)}
    assert_right(sizes, rule, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_what_no_query_sees_is_not_read(rule: str, dtype: torch.dtype) -> None:
    """Rows outside [start, end) hold NaN; results and gradients are those of rows that hold numbers."""
    tensors, options = inputs(COMMON, dtype), RULES[rule]
    expected = with_gradients(run, tensors, COMMON, options)
    token = torch.arange(COMMON.T)
    hidden = torch.zeros(2, COMMON.T, dtype=torch.bool)
    if "starts" in options:
        hidden |= token < options["starts"][:, None]
    if "ends" in options:
        hidden |= token >= options["ends"][:, None]
    poisoned = [*tensors[:2], *(rows.masked_fill(hidden.unsqueeze(-1), torch.nan) for rows in tensors[2:])]
    for found, right in zip(with_gradients(run, poisoned, COMMON, options), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [3, 11])
def test_results_are_rounded_to_the_nearest_even_number(dtype: torch.dtype, heads: int) -> None:
    """Half of the sum of two tokens, which float32 holds exactly; float16 below its normal numbers too. In whole vectors and
    behind them, on the kernels for few rows and for many."""
    q_latent, q_rope, c_kv, k_rope = inputs(Sizes(1, 2, heads, 41, 8), dtype)
    for size in (1.0, 2.0**-17):
        rows = (c_kv.float() * size).to(dtype)
        out, _ = latent_attention(q_latent * 0, q_rope * 0, rows, k_rope, softmax_scale=1.0)
        expected = rows.float().mean(dim=1).to(dtype)
        assert torch.equal(out, expected[:, None, None].expand_as(out))


@pytest.mark.parametrize("rule", ["an empty range", "positions before the cache"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gets_zeros(rule: str, dtype: torch.dtype) -> None:
    tensors, options = inputs(COMMON, dtype), RULES[rule]
    starts, ends, positions, _, causal, window, _ = schema_order(COMMON, options)
    blind = ~visible_tokens(tensors[0], tensors[2], starts, ends, positions, causal, window).any(dim=-1)
    assert bool(blind.any())
    out, lse = run(tensors, COMMON, options)
    assert not out[blind].any()
    assert torch.equal(lse == -torch.inf, blind.unsqueeze(1).expand_as(lse))
    gradients = with_gradients(run, tensors, COMMON, options)[2:]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[0][blind].any() and not gradients[1][blind].any()


def strided(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    """The same numbers in other places: views with a dense last dimension."""
    q_latent, q_rope, c_kv, k_rope = tensors
    queries, rows = torch.cat([q_rope, q_latent], dim=-1), torch.cat([c_kv, k_rope], dim=-1)
    rank, rope = c_kv.shape[-1], k_rope.shape[-1]
    return {
        "one buffer": [queries[..., rope:], queries[..., :rope], rows[..., :rank], rows[..., rank:]],
        "heads before queries": [
            *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q_latent, q_rope)),
            *(x.unsqueeze(1).expand(-1, 2, -1, -1).contiguous()[:, 0] for x in (c_kv, k_rope)),
        ],
        "every second token": [
            *(x.repeat_interleave(2, dim=1)[:, ::2] for x in (q_latent, q_rope)),
            *(x.repeat_interleave(2, dim=1)[:, ::2] for x in (c_kv, k_rope)),
        ],
        "tokens before batch": [*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors)],
        "one row for all": [q_latent, q_rope, c_kv[:1].expand_as(c_kv), k_rope[:1].expand_as(k_rope)],
    }


@pytest.mark.parametrize("view", strided(inputs(COMMON)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [COMMON, Sizes(1, 65, 4, 32, 16)])
def test_strided_views_give_what_their_copies_give(view: str, dtype: torch.dtype, sizes: Sizes) -> None:
    views = strided(inputs(sizes, dtype))[view]
    copies = [x.contiguous() for x in views]
    expected = with_gradients(run, copies, sizes, {})
    for found, right in zip(with_gradients(run, views, sizes, {}), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0)


def test_results_are_contiguous() -> None:
    tensors = strided(inputs(COMMON, torch.bfloat16))["one buffer"]  # which the kernels of every device take
    for result in with_gradients(run, tensors, COMMON, {}):
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [Sizes(65, 300, 5, 32, 16), Sizes(1, 2000, 4, 64, 32, 1)])
def test_twenty_runs_on_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, sizes: Sizes) -> None:
    tensors, before = inputs(sizes, dtype), torch.get_num_threads()
    expected = with_gradients(run, tensors, sizes, {"starts": torch.arange(sizes.B)})
    try:
        for number in range(20):
            torch.set_num_threads(1 + number % 2)
            found = with_gradients(run, tensors, sizes, {"starts": torch.arange(sizes.B)})
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_large_scores_do_not_overflow() -> None:
    tensors = [tensor * 40 for tensor in inputs(COMMON)]
    exact = with_gradients(run, [tensor.double() for tensor in tensors], COMMON, {})
    for found, right in zip(with_gradients(run, tensors, COMMON, {})[:2], exact[:2], strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("only", ["out", "lse"])
def test_one_result_alone_may_be_differentiated(only: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.requires_grad_() for tensor in inputs(COMMON, dtype)]
        out, lse = run(leaves, COMMON, {})
        (out.square().sum() if only == "out" else lse.sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


def test_gradients_of_some_inputs_alone() -> None:
    tensors = inputs(COMMON)
    tensors[2].requires_grad_()
    run(tensors, COMMON, {})[0].sum().backward()
    assert tensors[2].grad is not None and tensors[0].grad is None

"""The bound of rounding errors itself: right code is inside it, by a margin that is no wider than it must be, faults are outside.

Right code is here the plain formula with its sums term by term in float32: the same bits on every machine, whatever its BLAS.
"""

from typing import Any

import pytest
import torch
from operands import COMMON, DTYPES, RULES, SIZES, Sizes, finite, inputs, rms, schema_order
from rounding import MOST, Rounded, assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention
from xeco_convert.ops._latent_attention import visible_tokens

Results = tuple[Tensor, Tensor]
WIDE = Sizes(3, 19, 2, 448, 32, 1)


def in_order(one: Tensor, other: Tensor, dim: int, keep: torch.dtype = torch.float32) -> Tensor:
    """Σ one·other along a dimension: one accumulator of dtype `keep`, each product rounded by itself."""
    products = (one * other).to(keep).movedim(dim, 0)
    total = torch.zeros_like(products[0]) if len(products) else products.sum(dim=0)
    for product in products:
        total = total + product
    return total.float()


def plainly(tensors: list[Tensor], sizes: Sizes, rule: dict[str, Any], keep: torch.dtype = torch.float32) -> Results:
    """out and lse by the formula in float32, exponentials and logarithms correctly rounded; out in the inputs' dtype."""
    q_latent, q_rope, c_kv, k_rope = (x.float() for x in tensors)
    starts, ends, positions, scale, causal, window, softcap = schema_order(sizes, rule)
    visible = visible_tokens(tensors[0], tensors[2], starts, ends, positions, causal, window).unsqueeze(1)
    queries, keys = torch.cat([q_latent, q_rope], dim=-1), torch.cat([c_kv, k_rope], dim=-1)
    scores = in_order(queries.transpose(1, 2).unsqueeze(3), keys[:, None, None], -1, keep) * scale
    if softcap:
        scores = (softcap * torch.tanh(scores.double() / softcap)).float()
    scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (scores - largest).double().exp().float()
    total = in_order(weights, torch.ones(()), -1, keep)
    lse = (total.double().log().float() + largest.squeeze(-1)).masked_fill(total == 0, -torch.inf)
    stored = weights.to(tensors[0].dtype).float()
    out = in_order(stored.unsqueeze(-1), c_kv[:, None, None], -2, keep) / total.masked_fill(total == 0, 1.0).unsqueeze(
        -1
    )
    return out.transpose(1, 2).to(tensors[0].dtype), lse


def ratios(found: Results, expected: list[Rounded]) -> list[float]:
    """Of the root mean squares: error over what is predicted."""
    pairs = zip((found[0], finite(found[1])), expected, strict=True)
    return [rms(one.double() - right.value) / rms(right.variance.sqrt()) for one, right in pairs]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_term_by_term_are_inside(rule: str, dtype: torch.dtype) -> None:
    tensors = inputs(COMMON, dtype)
    out, lse = plainly(tensors, COMMON, RULES[rule])
    assert_rounded_as_predicted([out, finite(lse)], predicted(tensors, COMMON, RULES[rule]))


@pytest.mark.parametrize("sizes", [WIDE, Sizes(1, 129, 3, 512, 128), Sizes(1, 700, 3, 24, 8), COMMON])
def test_what_is_predicted_of_sums_term_by_term_is_what_they_have(sizes: Sizes) -> None:
    """A bound that is far too wide would find nothing: seen 0.35 to 0.87."""
    tensors = inputs(sizes)
    assert all(0.2 < ratio < MOST / 2 for ratio in ratios(plainly(tensors, sizes, {}), predicted(tensors, sizes, {})))


@pytest.mark.usefixtures("level")
def test_kernels_are_off_by_at_most_twice_what_sums_term_by_term_are() -> None:
    """Over all sizes together, where luck evens out. Seen: 0.57 to 0.91."""
    fast, slow = torch.zeros(2), torch.zeros(2)
    for sizes in [size for size in SIZES if size.B * size.Q * size.T] + [WIDE]:
        tensors = inputs(sizes)
        expected = predicted(tensors, sizes, {})
        fast += torch.tensor(ratios(latent_attention(*tensors, softmax_scale=sizes.softmax_scale), expected)).square()
        slow += torch.tensor(ratios(plainly(tensors, sizes, {}), expected)).square()
    assert bool((fast.sqrt() <= 2 * slow.sqrt()).all()), (fast / slow).sqrt()


def without_a_token(tensors: list[Tensor], sizes: Sizes) -> Results:
    return plainly(tensors, sizes, {"starts": torch.ones(sizes.B, dtype=torch.int64)})


def with_a_hidden_token(tensors: list[Tensor], sizes: Sizes) -> Results:
    return plainly(tensors, sizes, {"query_positions": torch.full((sizes.B,), sizes.T - sizes.Q + 1)})


def without_a_latent_channel(tensors: list[Tensor], sizes: Sizes) -> Results:
    q_latent = tensors[0].clone()
    q_latent[..., -1] = 0
    return plainly([q_latent, *tensors[1:]], sizes, {})


def without_a_rotary_pair(tensors: list[Tensor], sizes: Sizes) -> Results:
    k_rope = tensors[3].clone()
    k_rope[..., [-1, sizes.P // 2 - 1]] = 0
    return plainly([*tensors[:3], k_rope], sizes, {})


def with_another_scale(tensors: list[Tensor], sizes: Sizes) -> Results:
    """By one part in ten thousand."""
    scores = [(x.double() * 1.0001).float() for x in tensors[:2]]
    out, lse = plainly([*scores, *(x.float() for x in tensors[2:])], sizes, {})
    return out.to(tensors[0].dtype), lse


def without_the_last_sum(tensors: list[Tensor], sizes: Sizes) -> Results:
    """lse in another base."""
    out, lse = plainly(tensors, sizes, {})
    return out, lse * 1.4426950408889634


def one_wrong_row(tensors: list[Tensor], sizes: Sizes) -> Results:
    """A head that reads its neighbour's query, once."""
    out, lse = plainly(tensors, sizes, {})
    out[0, 0, 0] = out[0, 0, 1]
    return out, lse


def one_wrong_number(tensors: list[Tensor], sizes: Sizes) -> Results:
    """Its last sixteen bits, or its sign in the short dtypes."""
    out, lse = plainly(tensors, sizes, {})
    out[0, 0, 0, 0] = out[0, 0, 0, 0].bfloat16() * 1.01 if out.dtype == torch.float32 else -out[0, 0, 0, 0]
    return out, lse


FAULTS = [
    without_a_token,
    with_a_hidden_token,
    without_a_latent_channel,
    without_a_rotary_pair,
    with_another_scale,
    without_the_last_sum,
    one_wrong_row,
    one_wrong_number,
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [WIDE, COMMON])
def test_faults_are_outside(fault: Any, dtype: torch.dtype, sizes: Sizes) -> None:
    tensors = inputs(sizes, dtype)
    out, lse = fault(tensors, sizes)
    with pytest.raises(AssertionError, match="result"):
        assert_rounded_as_predicted([out, finite(lse)], predicted(tensors, sizes, {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [torch.bfloat16, torch.float16])
def test_sums_in_a_short_dtype_are_outside(dtype: torch.dtype, keep: torch.dtype) -> None:
    tensors = inputs(WIDE, dtype)
    out, lse = plainly(tensors, WIDE, {}, keep)
    with pytest.raises(AssertionError, match="result"):
        assert_rounded_as_predicted([out, finite(lse)], predicted(tensors, WIDE, {}))


def gradients(tensors: list[Tensor], d_out: Tensor, d_lse: Tensor) -> list[Tensor]:
    """In float64."""
    leaves = [x.double().requires_grad_() for x in tensors]
    results = latent_attention(*leaves, softmax_scale=COMMON.softmax_scale)
    return list(torch.autograd.grad(results, leaves, [d_out.double(), d_lse.double()]))


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    d_out = torch.randn(COMMON.B, COMMON.Q, COMMON.H, COMMON.R, generator=generator).to(dtype)
    return d_out, torch.randn(COMMON.B, COMMON.H, COMMON.Q, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_gradients_are_inside_and_wrong_ones_outside(dtype: torch.dtype) -> None:
    tensors, (d_out, d_lse) = inputs(COMMON, dtype), factors(dtype)
    expected = predicted(tensors, COMMON, {}, d_out, d_lse)[2:]
    right = gradients(tensors, d_out, d_lse)
    assert_rounded_as_predicted([x.to(dtype) for x in right], expected)
    for found, value in zip(right, expected, strict=True):
        torch.testing.assert_close(found, value.value, rtol=1e-11, atol=1e-11)
    forgotten = gradients(tensors, d_out, torch.zeros_like(d_lse))
    last = d_out.clone()
    last[:, -1] = 0
    faults = [forgotten, gradients(tensors, last, d_lse), [x * (1 + 16 * torch.finfo(dtype).eps) for x in right]]
    for wrong in faults:
        for one, value in zip(wrong, expected, strict=True):
            with pytest.raises(AssertionError, match="result"):
                assert_rounded_as_predicted([one.to(dtype)], [value])


def test_gradients_in_bfloat16_are_outside_what_float32_may_lose() -> None:
    tensors, (d_out, d_lse) = inputs(COMMON), factors(torch.float32)
    expected = predicted(tensors, COMMON, {}, d_out, d_lse)[2:]
    for one, value in zip(gradients(tensors, d_out, d_lse), expected, strict=True):
        with pytest.raises(AssertionError, match="result"):
            assert_rounded_as_predicted([one.bfloat16()], [value])

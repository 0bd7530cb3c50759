"""The closed form: exact where nothing is dropped, better with every rank, the same in any basis, honest about its error."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import formulas
import pytest
import torch
from builders import random_attention
from calibrated_layers import THETA, calibrated, collected, context_of, gaussian_inputs, output_error, source_output

from xeco_convert.factorize import SourceAttention
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.statistics import StatisticsAccumulator
from xeco_convert.modeling.layer_xeco import MlaShape

GROUPS = {"MHA": 4, "GQA": 2, "MQA": 1}
LENGTH = 12


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("bias", ["", "qkv", "qkvo"])
def test_the_forward_passes_are_those_of_the_formulas(groups: int, bias: str) -> None:
    source, x = random_attention(4, groups, bias=bias), gaussian_inputs(windows=2)
    context = context_of(source)
    assert formulas.THETA == THETA
    torch.testing.assert_close(source_output(source, x, context)[1], formulas.source_output(source, x[1]))
    mla = calibrated(source, x, context).factors(6, 4)
    shape = MlaShape(
        num_attention_heads=4,
        hidden_size=x.shape[-1],
        kv_lora_rank=6,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        rope_index=mla.rope_index,
    )
    expected = formulas.mla_output(mla, shape, x[1], head_dim=8)
    torch.testing.assert_close(mla_output(mla, 4, x, context)[1], expected)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("bias", ["", "qkv", "o", "qkvo"])
@pytest.mark.parametrize("table_scale", [1.0, 1.3])
@pytest.mark.parametrize("window", [None, 5])
def test_full_rank_and_all_rotary_components_equal_the_source(
    groups: int, bias: str, table_scale: float, window: int | None
) -> None:
    # hidden_size 80 is above the 2·G·d = 64 of MHA: the latent has every direction of keys and values
    source, x = random_attention(4, groups, hidden=80, bias=bias), gaussian_inputs(80, windows=16)
    context = context_of(source, table_scale=table_scale, window=window)
    mla = calibrated(source, x, context).factors(2 * groups * 8, groups * 8)
    fresh = gaussian_inputs(80, windows=3, seed=2)
    torch.testing.assert_close(
        mla_output(mla, 4, fresh, context), source_output(source, fresh, context), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("groups", [4, 2])
def test_full_rank_below_the_cache_width_equals_the_source(groups: int) -> None:
    """Where hidden_size is smaller than 2·G·d, that many rows span all keys and values."""
    hidden = 16 * groups - 8
    source, x = random_attention(4, groups, hidden=hidden), gaussian_inputs(hidden, windows=16)
    context = context_of(source)
    mla = calibrated(source, x, context).factors(hidden, groups * 8)
    torch.testing.assert_close(mla_output(mla, 4, x, context), source_output(source, x, context), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("rope", [2, 4, 8])
def test_the_error_never_grows_with_rank(groups: int, rope: int) -> None:
    """Attention's output on normal inputs that were not calibrated on, in steps of an eighth of the full rank. What is left
    at high ranks is the rotary components', which the last rows change by less than a thousandth."""
    source, x = random_attention(4, groups), gaussian_inputs(windows=32)
    context = context_of(source)
    layer, fresh = calibrated(source, x, context), gaussian_inputs(windows=32, seed=2)
    full = min(2 * groups * 8, 32)
    errors = [output_error(source, layer.factors(rank, rope), fresh, context) for rank in range(2, full + 1, full // 8)]
    assert all(later <= earlier * (1 + 1e-3) + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_expected_error_never_grows_with_rank_or_rotary_width(groups: int) -> None:
    source = random_attention(4, groups, hidden=80)
    layer = calibrated(source, gaussian_inputs(80, windows=16), context_of(source))
    full, ropes = 2 * groups * 8, range(2, groups * 8 + 1, 2)
    for rope in (2, groups * 8):
        by_rank = [layer.expected_error(rank, rope) for rank in range(1, full + 1)]
        assert all(later <= earlier + 1e-15 for earlier, later in pairwise(by_rank))
    gains = layer._components.gain
    assert gains.shape == (groups * 4,) and bool((gains[1:] <= gains[:-1]).all())
    assert layer.expected_error(full, max(ropes)) < 1e-12
    errors = layer.errors(full, groups * 8)
    # square roots of what float64 leaves of zero
    assert errors.key < 1e-6 and errors.value < 1e-6


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("rope", [2, 8])
def test_a_smaller_rank_is_a_prefix_of_a_larger(groups: int, rope: int) -> None:
    source, x = random_attention(4, groups, bias="qkvo"), gaussian_inputs()
    context = context_of(source)
    layer = calibrated(source, x, context)
    large = layer.factors(16, rope)
    assert large.kv_a_bias is not None
    for rank in (1, 5, 15):
        # a layer of its own: nothing may depend on what was asked for before
        small = calibrated(source, x, context).factors(rank, rope)
        assert small.kv_a_bias is not None
        assert torch.equal(small.kv_b_weight, large.kv_b_weight[:, :rank])
        # products of fewer rows may be summed in another order
        torch.testing.assert_close(small.kv_a_weight[:rank], large.kv_a_weight[:rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small.kv_a_weight[rank:], large.kv_a_weight[16:], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small.kv_a_bias[:rank], large.kv_a_bias[:rank], rtol=1e-12, atol=1e-12)
        assert small.q_weight is not None and large.q_weight is not None
        assert torch.equal(small.q_weight, large.q_weight)


def test_fewer_rotary_components_are_the_first_of_more() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    layer = calibrated(source, x, context_of(source))
    few, many = layer.factors(8, 4), layer.factors(8, 12)
    assert few.rope_index is not None and many.rope_index is not None
    assert few.rope_index == many.rope_index[:2]
    # half-split: real parts of all components, then imaginary ones
    rows = [8, 9, 8 + 6, 9 + 6]
    torch.testing.assert_close(few.kv_a_weight[8:], many.kv_a_weight[rows], rtol=1e-12, atol=1e-12)


def test_rotary_components_are_principal_directions_of_the_rotated_keys() -> None:
    """Each reads its own share: the moments of the components are diagonal, and decode puts all keys back."""
    source, x = random_attention(6, 3), gaussian_inputs(windows=16)
    context = context_of(source)
    statistics = collected(source, x, context)
    components = CalibratedLayer(source, statistics, context.softmax_scale)._components
    for frequency in range(4):
        mine = components.frequency == frequency
        assert int(mine.sum()) == 3
        identity = components.decode[mine].T @ components.encode[mine]
        torch.testing.assert_close(identity, torch.eye(3, dtype=identity.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_any_orthogonal_basis_of_the_hidden_size_gives_the_same_function(bias: str) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    noise = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    basis = torch.linalg.qr(noise).Q
    turned = dataclasses.replace(
        source,
        **{f"{which}_weight": getattr(source, f"{which}_weight") @ basis.T for which in "qkv"},
        o_weight=basis @ source.o_weight,
        o_bias=None if source.o_bias is None else basis @ source.o_bias,
    )
    for q_rank in (None, 9):
        plain = calibrated(source, x, context, with_inputs=True).factors(9, 4, q_lora_rank=q_rank)
        moved = calibrated(turned, x @ basis.T, context, with_inputs=True).factors(9, 4, q_lora_rank=q_rank)
        assert plain.rope_index == moved.rope_index
        torch.testing.assert_close(
            mla_output(moved, 4, x @ basis.T, context),
            mla_output(plain, 4, x, context) @ basis.T,
            rtol=1e-7,
            atol=1e-7,
        )


@pytest.mark.parametrize("order", [[1, 0, 2, 5, 4, 3], [3, 4, 5, 0, 1, 2], [5, 3, 4, 2, 0, 1]])
def test_any_order_of_heads_in_a_group_and_of_groups_gives_the_same_function(order: list[int]) -> None:
    source, x = random_attention(6, 2, bias="qkv"), gaussian_inputs()
    context = context_of(source)
    heads, groups = torch.tensor(order), torch.tensor([order[0] // 3, order[3] // 3])
    rows, columns = ((which[:, None] * 8 + torch.arange(8)).flatten() for which in (heads, groups))
    permuted = dataclasses.replace(
        source,
        q_weight=source.q_weight[rows],
        q_bias=source.q_bias[rows],  # type: ignore[index]
        k_weight=source.k_weight[columns],
        k_bias=source.k_bias[columns],  # type: ignore[index]
        v_weight=source.v_weight[columns],
        v_bias=source.v_bias[columns],  # type: ignore[index]
        o_weight=source.o_weight[:, rows],
    )
    plain, moved = calibrated(source, x, context).factors(9, 4), calibrated(permuted, x, context).factors(9, 4)
    assert plain.rope_index == moved.rope_index
    torch.testing.assert_close(mla_output(moved, 6, x, context), mla_output(plain, 6, x, context), rtol=1e-7, atol=1e-7)


def without_queries(source: SourceAttention) -> SourceAttention:
    return dataclasses.replace(source, q_weight=torch.zeros_like(source.q_weight))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("rank", [2, 6, 12])
def test_the_expected_error_is_the_measured_one_where_each_token_sees_itself_alone(groups: int, rank: int) -> None:
    """Windows of one token: weights are 1 for all heads, so all heads' errors add up and nothing cancels, and scores do
    not matter (queries are 0, so that keys cost nothing). The formula is exact there: on the calibration tokens up to
    rounding, on fresh normal inputs up to sampling."""
    source = without_queries(random_attention(4, groups))
    context = context_of(source, 1)
    x, fresh = (gaussian_inputs(windows=count, length=1, seed=count) for count in (1000, 20_000))
    layer = calibrated(source, x, context)
    mla, expected = layer.factors(rank, 2), layer.expected_error(rank, 2)
    # relative to the heads one by one, as the formula has it: together they may cancel
    heads = source_output_by_head(source, x).square().sum(dim=(1, 2)).mean()
    for inputs, tolerance in ((x, 1e-9), (fresh, 0.1)):
        lost = mla_output(mla, 4, inputs, context) - source_output(source, inputs, context)
        measured = float(lost.square().sum(dim=-1).mean() / heads)
        assert measured == pytest.approx(expected, rel=tolerance, abs=1e-12)


def source_output_by_head(source: SourceAttention, x: torch.Tensor) -> torch.Tensor:
    """What each head adds to the output of windows of one token [W, H, X]."""
    repeats = source.heads_per_group
    values = (x[:, 0] @ source.v_weight.T).unflatten(-1, (-1, source.head_dim)).repeat_interleave(repeats, dim=1)
    w_o = source.o_weight.unflatten(1, (source.num_attention_heads, -1))
    return torch.einsum("whv,xhv->whx", values, w_o)


@pytest.mark.parametrize(("rank", "rope"), [(4, 4), (10, 2), (20, 8)])
def test_the_latent_term_is_the_weighted_error_of_keys_and_values(rank: int, rope: int) -> None:
    """Normal κ = (keys, values) with the attended second moment, errors weighted by the metrics as defined: Σ λ_h q qᵀ for
    what the rotary key leaves of the keys, overlaps of heads times W_oᵀ W_o for values."""
    source, context = random_attention(4, 2), context_of(random_attention(4, 2))
    statistics = collected(source, gaussian_inputs(), context)
    layer = CalibratedLayer(source, statistics, context.softmax_scale)
    root = torch.linalg.cholesky(statistics.attended + 1e-10 * torch.eye(32, dtype=torch.float64))
    noise = torch.randn(60_000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    kappa = noise @ root.T
    # the maps from κ: factors of a source whose keys and values are κ itself
    whole = dataclasses.replace(
        source, k_weight=torch.eye(32, dtype=torch.float64)[:16], v_weight=torch.eye(32, dtype=torch.float64)[16:]
    )
    mla = CalibratedLayer(whole, statistics, context.softmax_scale).factors(32, rope)
    full = mla.kv_b_weight.view(2, 2, 16, 32)[:, 0]  # [G, d + d, R], one head of each group
    lost = full[:, :, rank:] @ mla.kv_a_weight[rank:32]
    errors = torch.einsum("gur,nr->ngu", lost, kappa)
    w_o = source.o_weight.view(32, 4, 8).permute(1, 0, 2)
    spread = statistics.values.view(2, 8, 2, 8).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    measured = 0.0
    for head in range(4):
        group = head // 2
        metric = w_o[head].T @ w_o[head]
        weight = context.softmax_scale**2 * float((metric * spread[group]).sum())
        mla_queries = mla.q_weight.view(4, 8 + rope, 32)[head, :8]  # type: ignore[union-attr]
        turned = mla_queries @ torch.linalg.pinv(source.q_weight.view(4, 8, 32)[head])  # q̃ = turned · q
        moment = turned @ statistics.queries[head] @ turned.T
        measured += weight * float(
            torch.einsum("nd,de,ne->n", errors[:, group, :8], moment, errors[:, group, :8]).mean()
        )
        for other in range(4):
            both = statistics.overlap[head, other] * w_o[head].T @ w_o[other]
            pair = torch.einsum("nd,de,ne->n", errors[:, group, 8:], both, errors[:, other // 2, 8:])
            measured += float(pair.mean())
    heads = sum(float((w_o[head].T @ w_o[head] * spread[head // 2]).sum()) for head in range(4))
    expected = float(layer.latent_spectrum(rope)[rank:].sum())
    assert measured / heads == pytest.approx(expected, rel=0.02)


def test_padding_changes_no_statistic() -> None:
    """Padded on the right with huge inputs that do not count: the statistics of the texts without them."""
    source, x = random_attention(4, 2, bias="qkv"), gaussian_inputs()
    padded = torch.cat([x[:, :9], torch.full((8, 3, 32), 1e3, dtype=torch.float64)], dim=1)
    counts = torch.arange(LENGTH).expand(8, -1) < 9
    found = collected(source, padded, context_of(source), counts, with_inputs=True)
    plain = collected(source, x[:, :9], context_of(source, 9), with_inputs=True)
    for name, expected in vars(plain).items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(getattr(found, name), expected, msg=name)
        else:
            assert getattr(found, name) == expected


def test_uncounted_tokens_look_at_nothing_and_are_seen() -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=2)
    counts = torch.ones(2, LENGTH, dtype=torch.bool)
    counts[:, 0] = False
    statistics = collected(source, x, context_of(source), counts)
    assert statistics.num_tokens == 2 * (LENGTH - 1)
    values = (x[:, 1:].flatten(0, 1) @ source.v_weight.T).double()
    torch.testing.assert_close(statistics.values, values.T @ values / statistics.num_tokens)
    moved = x.clone()
    moved[:, 0] += 5.0  # the first token counts for no moment of values and queries, but others look at it
    other = collected(source, moved, context_of(source), counts)
    torch.testing.assert_close(other.values, statistics.values)
    torch.testing.assert_close(other.queries, statistics.queries)
    assert not torch.allclose(other.attended, statistics.attended)


def test_windows_may_come_in_any_pieces_and_nothing_is_refused() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    context, counts = context_of(source), torch.ones(8, LENGTH, dtype=torch.bool)
    pieces = StatisticsAccumulator(source, context)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        sums, pieces = pieces.sums(), StatisticsAccumulator(source, context)
        pieces.restore(sums)  # another one goes on
        pieces.add(x[part], counts[part])
    whole = collected(source, x, context)
    for name, expected in vars(whole).items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(getattr(pieces.result(), name), expected)
    empty = StatisticsAccumulator(source, context)
    empty.add(x, torch.zeros_like(counts))
    with pytest.raises(ValueError, match="at least one token that counts"):
        empty.result()


@pytest.mark.parametrize("table_scale", [1.0, 1.3])
def test_statistics_are_those_of_the_definitions(table_scale: float) -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=1)
    context = context_of(source, table_scale=table_scale)
    statistics = collected(source, x, context)
    turn = formulas.angles(LENGTH, formulas.fresh_frequencies(8))
    q = (x[0] @ source.q_weight.T).view(LENGTH, 4, 8)
    k, v = ((x[0] @ weight.T).view(LENGTH, 2, 8) for weight in (source.k_weight, source.v_weight))
    rotated = [table_scale * formulas.rotate_half_split(part, turn) for part in (q, k.repeat_interleave(2, dim=1))]
    scores = torch.einsum("thd,shd->hts", *rotated) * 8**-0.5
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(diagonal=1)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    kappa = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
    attended = torch.einsum("hts,si,sj->ij", shares, kappa, kappa) / (4 * LENGTH)
    torch.testing.assert_close(statistics.attended, attended)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None]
    turned = torch.polar(torch.ones(LENGTH, LENGTH, 4).double(), -distance[..., None] * turn[1])
    mean = torch.einsum("hts,tsf->hf", shares.to(turned.dtype), turned) / LENGTH
    torch.testing.assert_close(statistics.rotation, table_scale**2 * mean)
    assert statistics.rotation_scale == pytest.approx(table_scale**2)
    overlap = torch.nn.functional.cosine_similarity(shares.flatten(1)[:, None], shares.flatten(1)[None], dim=-1)
    torch.testing.assert_close(statistics.overlap, overlap)


@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_factorised_queries_of_full_rank_are_exact(bias: str) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs(windows=16)
    context = context_of(source)
    layer = calibrated(source, x, context, with_inputs=True)
    low, plain = layer.factors(10, 4, q_lora_rank=32), layer.factors(10, 4)
    assert low.q_weight is None and low.q_a_weight is not None and low.q_a_weight.shape == (32, 32)
    torch.testing.assert_close(mla_output(low, 4, x, context), mla_output(plain, 4, x, context), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_factorised_queries_are_the_best_for_the_scores(rank: int) -> None:
    """Score errors of all heads by what they cost at the output, over pairs of any query and any attended key at an even
    rotation: what the spectrum discards, and below that of the best approximation of the queries as such."""
    source, x = random_attention(4, 2), gaussian_inputs(windows=16)
    context = context_of(source)
    statistics = collected(source, x, context, with_inputs=True)
    layer = CalibratedLayer(source, statistics, context.softmax_scale)
    low, whole = layer.factors(10, 4, q_lora_rank=rank), layer.factors(10, 4)
    exact = whole.q_weight
    assert low.q_a_weight is not None and low.q_b_weight is not None and exact is not None
    # moments of the converted keys over attended tokens: κ through the maps that read it
    maps = whole.kv_a_weight @ torch.linalg.pinv(torch.cat([source.k_weight, source.v_weight]))
    moment = maps @ statistics.attended @ maps.T
    w_uk = whole.kv_b_weight.view(4, 16, 10)[:, :8]
    w_o = source.o_weight.view(32, 4, 8).permute(1, 0, 2)
    spread = statistics.values.view(2, 8, 2, 8).diagonal(dim1=0, dim2=2).permute(2, 0, 1).repeat_interleave(2, dim=0)
    cost = context.softmax_scale**2 * torch.einsum("hxd,hde,hxe->h", w_o, spread, w_o)
    tokens = x.flatten(0, 1)

    def error(approximation: torch.Tensor) -> float:
        lost = ((tokens @ (approximation - exact).T).unflatten(1, (4, 12))).transpose(0, 1)  # [H, n, N + P]
        nope, rope = lost.split([8, 4], dim=-1)
        power = moment.diagonal()[10:].view(2, 2).mean(dim=0).repeat(2)
        un_rotated = torch.einsum("hnd,hdr,rs,hes,hne->h", nope, w_uk, moment[:10, :10], w_uk, nope)
        return float((cost * (un_rotated + (rope.square() * power).sum(dim=(1, 2)))).sum()) / len(tokens)

    root = torch.linalg.cholesky(tokens.T @ tokens / tokens.shape[0])
    u, s, vh = torch.linalg.svd(exact @ root, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    assert error(low.q_b_weight @ low.q_a_weight) < 0.999 * error(plain)
    # no nearby factors of that rank are better
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        nearby = [
            weight + 1e-3 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            for weight in (low.q_b_weight, low.q_a_weight)
        ]
        assert error(nearby[0] @ nearby[1]) > error(low.q_b_weight @ low.q_a_weight) * (1 - 1e-6)


def test_factorised_queries_need_the_inputs() -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    with pytest.raises(AssertionError, match="second moments of the inputs"):
        calibrated(source, x, context_of(source)).factors(10, 4, q_lora_rank=8)


def test_the_weight_of_the_latent_norm_is_the_rms_of_the_attended_latent() -> None:
    source, x = random_attention(4, 2, bias="qkv"), gaussian_inputs(windows=16)
    context = context_of(source)
    statistics = collected(source, x, context)
    layer = CalibratedLayer(source, statistics, context.softmax_scale)
    mla, plain = layer.factors(10, 4, latent_norm=True), layer.factors(10, 4)
    weight = mla.latent_norm_weight
    assert weight is not None and weight.shape == (10,) and mla.kv_a_bias is not None
    # the plain latent as a map of (keys, values): its moment over attended tokens
    joint = torch.cat([source.k_weight, source.v_weight])
    maps = plain.kv_a_weight[:10] @ torch.linalg.pinv(joint)
    moment = (maps @ statistics.attended @ maps.T).diagonal().mean()
    torch.testing.assert_close(weight, moment.sqrt().expand(10), rtol=1e-7, atol=0)
    # what the weight multiplies has rms 1, so that the norm hardly changes it
    torch.testing.assert_close(mla.kv_a_weight[:10] * weight[0], plain.kv_a_weight[:10], rtol=1e-7, atol=1e-12)


def test_a_latent_norm_changes_little() -> None:
    """Latents of 24 rows have much the same rms on every token, so the norm with that rms as weight nearly is one."""
    source, x = random_attention(4, 2), gaussian_inputs(windows=16, mean=0.0)
    context = context_of(source)
    layer = calibrated(source, x, context)
    normed, plain = layer.factors(24, 8, latent_norm=True), layer.factors(24, 8)
    wrong = dataclasses.replace(normed, latent_norm_weight=1 / normed.latent_norm_weight)  # type: ignore[operator]
    assert output_error(source, plain, x, context) < output_error(source, normed, x, context) < 0.5
    assert output_error(source, wrong, x, context) > 2 * output_error(source, normed, x, context)


@pytest.mark.parametrize("what", ["queries", "values", "one group's queries", "repeated keys", "few tokens"])
def test_degenerate_layers_give_finite_factors(what: str) -> None:
    source, x = random_attention(4, 2), gaussian_inputs()
    if what == "queries":
        source = without_queries(source)
    elif what == "values":
        source = dataclasses.replace(source, v_weight=torch.zeros_like(source.v_weight))
    elif what == "one group's queries":
        weight = source.q_weight.clone()
        weight[16:] = 0
        source = dataclasses.replace(source, q_weight=weight)
    elif what == "repeated keys":
        source = dataclasses.replace(source, k_weight=source.k_weight[:8].repeat(2, 1))
    else:
        x = x[:1, :3].repeat(1, 4, 1)
    context = context_of(source)
    layer = calibrated(source, x, context)
    for rank, rope in ((4, 2), (32, 16)):
        mla = layer.factors(rank, rope)
        assert all(bool(tensor.isfinite().all()) for tensor in mla.tensors().values())
        assert bool(mla_output(mla, 4, x, context).isfinite().all())
    exact = mla_output(layer.factors(32, 16), 4, x, context)
    torch.testing.assert_close(exact, source_output(source, x, context), rtol=1e-5, atol=1e-5)
    assert math.isfinite(layer.expected_error(4, 2)) and math.isfinite(layer.errors(4, 2).key)
    assert math.isfinite(layer.errors(4, 2).value)


@pytest.mark.parametrize("bias", ["", "qkv"])
def test_directions_that_the_tokens_leave_out_get_a_ridge(bias: str) -> None:
    """Three different tokens reach three directions. The ridge orders the others by their weights, and what the tokens do
    reach stays what it was; enough tokens need none."""
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs()
    context = context_of(source)
    enough = collected(source, x, context)
    whole = enough.regularised(source)
    assert whole.unseen == 0 and whole.directions == 32 and whole.attended is enough.attended
    few = collected(source, x[:1, :3].repeat(1, 4, 1), context)
    found = few.regularised(source)
    assert (found.unseen, found.directions) == (29, 32)
    assert int(torch.linalg.matrix_rank(few.attended)) == 3 and int(torch.linalg.matrix_rank(found.attended)) == 32
    assert float((found.attended - few.attended).norm() / few.attended.norm()) < 1e-5
    plain, ridged = (CalibratedLayer(source, each, context.softmax_scale) for each in (few, found))
    for rank in (2, 3):
        assert ridged.expected_error(rank, 4) == pytest.approx(plain.expected_error(rank, 4), rel=1e-3, abs=1e-5)
    # on other inputs the closed form of the ridge is far better: without it the other rows of the latent are arbitrary
    fresh = gaussian_inputs(windows=16, seed=4)
    errors = [output_error(source, layer.factors(24, 8), fresh, context) for layer in (ridged, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_keys_and_values_of_low_rank_need_no_ridge() -> None:
    """Directions that the weights do not have are no fault of the text."""
    source, x = random_attention(4, 2), gaussian_inputs()
    source = dataclasses.replace(source, k_weight=source.k_weight[:8].repeat(2, 1))
    found = collected(source, x, context_of(source)).regularised(source)
    assert (found.unseen, found.directions) == (0, 24)

"""The budget split is the best one, the widths on offer are rounded, and what cannot be met is refused with a number."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from xeco_convert.errors import OptionError
from xeco_convert.ranks import CacheFacts, Widths
from xeco_convert.ranks.budget import (
    candidate_widths,
    default_multiple,
    full_splits,
    rope_step,
    split_budget,
    with_the_rest,
)

OFFERS = [Widths(kv_lora_rank=rank, qk_rope_head_dim=rope) for rank, rope in [(4, 2), (4, 4), (8, 2), (8, 4), (12, 6)]]


def numbers(widths: Widths) -> int:
    """A size: numbers of one byte."""
    return widths.total


# full rank, most rotary rows, multiple, average
CASES = [
    (64, 32, 4, 16),
    (256, 128, 16, 64),
    (256, 128, 16, 128),
    (256, 128, 16, 32),
    (2048, 1024, 16, 512),
    (48, 32, 4, 64),
]


@pytest.mark.parametrize("seed", range(20))
def test_the_split_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    costs = [{offer: rng.random() for offer in rng.sample(OFFERS, rng.randint(2, 5))} for _ in range(4)]
    smallest = sum(min(offer.total for offer in offers) for offers in costs)
    for budget in (smallest, smallest + 1, smallest + rng.randrange(2, 40), 1000):
        chosen = split_budget(costs, budget, numbers)
        best = min(
            sum(layer[offer] for layer, offer in zip(costs, choice, strict=True))
            for choice in itertools.product(*costs)
            if sum(offer.total for offer in choice) <= budget
        )
        assert sum(offer.total for offer in chosen) <= budget
        assert sum(layer[offer] for layer, offer in zip(costs, chosen, strict=True)) == pytest.approx(best)


def coded(rank: int, bits: int = 3) -> Widths:
    return Widths(kv_lora_rank=rank, qk_rope_head_dim=8, latent_bits=bits, rope_bits=6)


def facts_of(**changes: Any) -> CacheFacts:
    """Three layers of up to 64 ranks, whose rows take whole bytes and two for the scale."""
    known: dict[str, Any] = {
        "cache_width": 128,
        "num_layers": 3,
        "numbers_before": 384,
        "numbers_kept": 0,
        "number_bytes": 2,
    }
    known |= {"full_rank": 64, "most_rope_dim": 32, "same_widths": False, "bits": ((3, 6),)}
    size = lambda widths: widths.kv_lora_rank * widths.latent_bits // 8 + 8  # noqa: E731
    whole = lambda widths: widths.kv_lora_rank % 8 == 0  # noqa: E731
    return CacheFacts(**{**known, "layer_bytes": size, "can_cache": whole, **changes})


def test_what_is_left_goes_to_the_ranks_that_save_most() -> None:
    falls = ((1.0, 0.5), (1.0, 0.9), (0.2, 0.1))  # what 16 and 32 ranks cost
    costs = [{coded(16): low, coded(32): high} for low, high in falls]
    chosen, facts = [coded(16)] * 3, facts_of()
    budget = 3 * 14
    assert with_the_rest(chosen, costs, budget + 2, facts) == chosen
    ranks = [
        [each.kv_lora_rank for each in with_the_rest(chosen, costs, budget + 3 * more, facts)] for more in range(1, 6)
    ]
    # the first falls by a square root of 2 with 8 ranks, and so does the third, from less
    assert ranks[0] == [24, 16, 16] and ranks[1] == [32, 16, 16]
    assert all(sum(each) == 48 + 8 * more for more, each in enumerate(ranks, 1))
    assert all(later[layer] >= each[layer] for each, later in itertools.pairwise(ranks) for layer in range(3))
    filled = with_the_rest(chosen, costs, 10_000, facts)
    assert [each.kv_lora_rank for each in filled] == [64] * 3


def test_the_rest_leaves_numbers_of_16_bits_and_a_given_multiple_as_they_are() -> None:
    wide = Widths(kv_lora_rank=16, qk_rope_head_dim=8)
    assert with_the_rest([wide], [{wide: 1.0}], 10_000, facts_of()) == [wide]
    for step, expected in ((16, 64), (32, 48), (2, 16)):  # rows of 18 numbers in 3 bits are no whole bytes
        found = with_the_rest([coded(16)], [{coded(16): 1.0}], 10_000, facts_of(), step)
        assert found[0].kv_lora_rank == expected


def test_a_sensitive_layer_gets_more() -> None:
    costs = [{offer: weight / offer.total for offer in OFFERS} for weight in (1.0, 10.0, 1.0)]
    first, second, third = (widths.total for widths in split_budget(costs, 36, numbers))
    assert second > first and second > third


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    costs = [{OFFERS[0]: 1.0, OFFERS[1]: 0.5}, {OFFERS[2]: 1.0}]
    assert split_budget(costs, 16, numbers) == (OFFERS[0], OFFERS[2])
    with pytest.raises(OptionError, match=r"budget of 15 bytes per token .*smallest possible is 16.*--rank-multiple"):
        split_budget(costs, 15, numbers)


@pytest.mark.parametrize(
    ("cache_width", "multiple"), [(8, 2), (32, 2), (48, 2), (64, 4), (128, 8), (255, 8), (256, 16), (2048, 16)]
)
def test_default_multiple(cache_width: int, multiple: int) -> None:
    assert default_multiple(cache_width) == multiple


@pytest.mark.parametrize(("multiple", "step"), [(2, 2), (4, 2), (6, 2), (8, 4), (16, 8), (32, 16)])
def test_rotary_steps_are_even_and_half_of_the_ranks(multiple: int, step: int) -> None:
    assert rope_step(multiple) == step


@pytest.mark.parametrize(("full_rank", "most_rope", "multiple", "average"), CASES)
def test_candidates_are_rounded_around_the_average_and_few(
    full_rank: int, most_rope: int, multiple: int, average: float
) -> None:
    offers = candidate_widths(full_rank, most_rope, multiple, average)
    ropes = {offer.qk_rope_head_dim for offer in offers}
    assert len(offers) == len(set(offers)) <= 16 * len(ropes) and len(ropes) <= 2 * math.log2(2 * most_rope)
    for offer in offers:
        assert offer.kv_lora_rank % multiple == 0 and 0 < offer.kv_lora_rank <= full_rank
        assert offer.qk_rope_head_dim % rope_step(multiple) == 0 and 0 < offer.qk_rope_head_dim <= most_rope
    totals = sorted(offer.total for offer in offers)
    assert any(total <= average for total in totals)
    assert max(totals) > min(average, 0.9 * full_rank)


@pytest.mark.parametrize(("full_rank", "most_rope", "multiple", "average"), CASES)
def test_the_smallest_widths_are_always_on_offer(full_rank: int, most_rope: int, multiple: int, average: float) -> None:
    least = Widths(kv_lora_rank=multiple, qk_rope_head_dim=rope_step(multiple))
    for size in (average, least.total, 1.5 * least.total, 10 * average):
        assert least in candidate_widths(full_rank, most_rope, multiple, size)


@pytest.mark.parametrize(
    ("most_rope", "expected"), [(30, [8, 16, 24, 30]), (32, [8, 16, 24, 32]), (58, [8, 16, 24, 32, 40, 48, 56, 58])]
)
def test_the_widest_rotary_key_is_offered_even_where_it_is_no_multiple(most_rope: int, expected: list[int]) -> None:
    """Where a rotary scaling leaves only so many frequencies as they are."""
    offers = full_splits(512, most_rope, 16, 128)
    assert [offer.qk_rope_head_dim for offer in offers] == expected
    assert all(offer.total <= 128 and offer.kv_lora_rank % 8 == 0 for offer in offers)

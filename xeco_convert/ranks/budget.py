"""A KV budget, split between latent and rotary key and across layers so that the expected cost at the output is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from xeco_convert.errors import OptionError
from xeco_convert.ranks.policy import RANK_POLICIES, CacheFacts, RankPolicy, Widths, WidthSurvey
from xeco_convert.settings import option, parse_share, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = Callable[[Widths], int]  # bytes that some widths cache per token

DEFAULT_MULTIPLE = 16  # attention kernels like ranks that are multiples of 16
_MOST_RANKS = 16  # on offer for each rotary width
_REST = 8  # ranks that what is left is spent on at a time: a byte in each bit plane


@RANK_POLICIES.add
@dataclass(frozen=True, kw_only=True)
class KvBudget(RankPolicy):
    """`kv_size`, a share of the source's cache, or `kv_bytes_per_token`; widths in steps of `rank_multiple`."""

    name = "budget"
    order = 2
    chosen_by = ("kv_size", "kv_bytes_per_token")
    sentences: ClassVar[Mapping[str, str]] = {
        "rank_multiple": "--rank-multiple: expected an even number of at least 2, together with --kv-size; change the value."
    }
    conflicts: ClassVar[Mapping[str, str]] = {
        "rope_dim": "--rope-dim: a KV size chooses the rotary width itself; give --rank with it, or leave it out."
    }
    needs_costs = True
    chooses_bits = True

    kv_size: str | None = option(
        "Size of the KV cache as a share of the source's, e.g. 25%; split over layers, latent and rotary key by sensitivity.",
        metavar="SHARE",
        recorded=True,
    )
    kv_bytes_per_token: int | None = option(
        "The same, as bytes per token of the whole model.", metavar="N", recorded=True
    )
    rank_multiple: int | None = option(
        "With a KV size: widths are multiples of this. [16, or less for caches below 256 numbers]", metavar="N"
    )

    def __post_init__(self) -> None:
        if self.rank_multiple is not None and (self.rank_multiple < 2 or self.rank_multiple % 2):
            raise OptionError(self.sentences["rank_multiple"])
        positive = self.kv_bytes_per_token is None or self.kv_bytes_per_token > 0
        require(positive, "--kv-bytes-per-token", "a positive whole number", self.kv_bytes_per_token)
        if self.kv_size is not None:
            parse_share(self.kv_size)

    def multiple(self, facts: CacheFacts) -> int:
        """Step of the ranks."""
        return self.rank_multiple or default_multiple(facts.cache_width)

    def budget(self, facts: CacheFacts) -> int:
        total = self.kv_bytes_per_token or 0
        if self.kv_size is not None:
            total = int(parse_share(self.kv_size) * facts.numbers_before * facts.number_bytes + 1e-9)
        return total - facts.numbers_kept * facts.number_bytes

    def check_source(self, facts: CacheFacts) -> None:
        """Refuse a budget below one step for latent and rotary key in each layer, or below what kept layers take."""
        budget, multiple, possible = self.budget(facts), self.multiple(facts), self._smallest_of(facts)
        if not possible:
            raise OptionError(
                f"--rank-multiple: expected a step whose rows are whole bytes and no wider than the source's {facts.full_rank} "
                f"directions of keys and values, found {multiple}; change the value, or --cache-bits."
            )
        least = min(map(facts.layer_bytes, possible)) * facts.num_layers
        if budget >= least:
            return
        before, kept = (numbers * facts.number_bytes for numbers in (facts.numbers_before, facts.numbers_kept))
        flag = "--kv-size" if self.kv_size is not None else "--kv-bytes-per-token"
        raise OptionError(
            f"{flag}: expected at least {(least + kept) / before:.1%} ({least + kept} bytes per token) for {facts.num_layers} "
            f"converted layers in steps of {multiple}, found {(budget + kept) / before:.1%} ({budget + kept} bytes); allow more, "
            "lower --rank-multiple, or cache fewer bits (--cache-bits)."
        )

    def _smallest_of(self, facts: CacheFacts) -> list[Widths]:
        """The least widths in each of the bits on offer, those that a layer of the source can have."""
        every = (_smallest(_step(self.multiple(facts), bits, facts), bits) for bits in facts.bits)
        most_rope = (
            facts.most_rope_dim or math.inf
        )  # layers that rotate nothing have rotary widths on offer, and take none
        return [each for each in every if each.kv_lora_rank <= facts.full_rank and each.qk_rope_head_dim <= most_rope]

    def describe(self, facts: CacheFacts, widths: Widths, default: str) -> str:
        return f"kv_lora_rank and qk_rope_head_dim by sensitivity, ranks in steps of {self.multiple(facts)}"

    def widths(self, survey: WidthSurvey, facts: CacheFacts, rope_dims: Sequence[int]) -> list[Widths]:
        budget = self.budget(facts)
        average = budget / facts.num_layers
        offers: list[Widths] = []
        for smallest in self._smallest_of(facts):
            bits, multiple = smallest.bits, smallest.kv_lora_rank
            if facts.layer_bytes(smallest) > average:
                continue
            numbers = affordable_numbers(average, bits, facts)
            if facts.same_widths:
                some = full_splits(facts.full_rank, facts.most_rope_dim, multiple, int(numbers))
            else:
                some = candidate_widths(facts.full_rank, facts.most_rope_dim, multiple, numbers)
            offers += [replace(widths, latent_bits=bits[0], rope_bits=bits[1]) for widths in some]
        costs = survey.costs(offers, average)
        if facts.same_widths:
            return list(same_widths(costs, budget, facts.layer_bytes))
        chosen = split_budget(costs, budget, facts.layer_bytes)
        return with_the_rest(chosen, costs, budget, facts, self.rank_multiple or _REST)


def affordable_numbers(size: float, bits: tuple[int, int], facts: CacheFacts) -> float:
    """Numbers of a layer in so many bits that `size` bytes pay for, at an even split between latent and rotary key."""
    some = Widths(kv_lora_rank=256, qk_rope_head_dim=256, latent_bits=bits[0], rope_bits=bits[1])
    twice = replace(some, kv_lora_rank=512, qk_rope_head_dim=512)
    for_each = (facts.layer_bytes(twice) - facts.layer_bytes(some)) / some.total
    scales = facts.layer_bytes(some) - for_each * some.total
    return (size - scales) / for_each


def _step(multiple: int, bits: tuple[int, int], facts: CacheFacts) -> int:
    """The step of ranks in these bits: `multiple`, or the next of its multiples whose rows are whole bytes."""
    return multiple if facts.can_cache(_smallest(multiple, bits)) else math.lcm(multiple, DEFAULT_MULTIPLE)


def _smallest(multiple: int, bits: tuple[int, int]) -> Widths:
    """The least widths in steps of `multiple`."""
    return Widths(kv_lora_rank=multiple, qk_rope_head_dim=rope_step(multiple), latent_bits=bits[0], rope_bits=bits[1])


def default_multiple(cache_width: int) -> int:
    """16, or the largest power of two within 1/16 of a layer's cache where that is smaller (at least 2)."""
    multiple = DEFAULT_MULTIPLE
    while multiple > 2 and multiple > cache_width / 16:
        multiple //= 2
    return multiple


def candidate_widths(full_rank: int, most_rope: int, multiple: int, average: float) -> list[Widths]:
    """Widths worth offering around an average of `average` numbers per token and layer.

    Sums from 0.4 to 2.2 times the average, a rotary share from 1/8 to 3/4; ranks in steps of `multiple`. Rotary widths are
    few, half a step times 1, 2, 3, 4, 6, 8, 12, …, and the same whatever the average: each takes a decomposition of its own
    in every layer, which all ranks share. The smallest of all is always there, so that a budget that can be met at all is.
    """
    half = rope_step(multiple)
    least = Widths(kv_lora_rank=multiple, qk_rope_head_dim=half)
    offers = [least]
    for rope in _rotary_widths(half, most_rope):
        ranks = [
            rank
            for rank in range(multiple, full_rank + 1, multiple)
            if 0.4 * average <= rank + rope <= 2.2 * average and 1 / 8 <= rope / (rank + rope) <= 3 / 4
        ]
        thinned = {ranks[round(place * (len(ranks) - 1) / (_MOST_RANKS - 1))] for place in range(_MOST_RANKS) if ranks}
        some = [Widths(kv_lora_rank=rank, qk_rope_head_dim=rope) for rank in sorted(thinned)]
        offers += [widths for widths in some if widths != least]
    return offers


def _rotary_widths(half: int, most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … times `half`, up to `most` and with it where it is a multiple."""
    factors = [1, *sorted(first << power for first in (2, 3) for power in range(most.bit_length()))]
    return sorted({half * each for each in factors if half * each <= most} | ({most} if most % half == 0 else set()))


def full_splits(full_rank: int, most_rope: int, multiple: int, average: int) -> list[Widths]:
    """For the same widths in every layer: each rotary width with the largest rank that the average leaves for it."""
    half = rope_step(multiple)
    offers = [
        Widths(kv_lora_rank=min(full_rank, (average - rope) // half * half), qk_rope_head_dim=rope)
        for rope in [*range(half, most_rope, half), most_rope]  # the widest even where it is no multiple
        if 0 < rope <= average - multiple
    ]
    return offers or [Widths(kv_lora_rank=multiple, qk_rope_head_dim=half)]


def without_rotation(offers: Sequence[Widths], full_rank: int) -> list[Widths]:
    """The same sums for a layer that rotates nothing (NoPE): all of them latent, each sum once."""
    sums = sorted({(min(widths.total, full_rank), widths.bits) for widths in offers})
    return [
        Widths(kv_lora_rank=total, qk_rope_head_dim=0, latent_bits=bits[0], rope_bits=bits[1]) for total, bits in sums
    ]


def rope_step(multiple: int) -> int:
    """Step of the rotary width: half a step of the rank, even because rotary rows come in pairs."""
    return max(2, multiple // 2 // 2 * 2)


def split_budget(costs: Sequence[Mapping[Widths, float]], budget: int, size_of: Size) -> tuple[Widths, ...]:
    """Widths for every layer whose sizes stay within `budget` (bytes per token of all layers) at the least summed cost.

    `costs`: for each layer the expected cost of every width on offer. An exact dynamic programme over the budget. Raises
    `OptionError` that says the smallest possible budget where none fits.
    """
    smallest = sum(min(map(size_of, offers)) for offers in costs)
    if smallest > budget:
        raise _cannot_be_met(budget, smallest)
    import numpy as np  # not for --help

    unit = math.gcd(*(size_of(widths) for offers in costs for widths in offers))
    steps = budget // unit
    best = np.zeros(steps + 1)  # least cost of the layers so far within each budget
    picks: list[tuple[list[Widths], NDArray[np.int64]]] = []
    for offers in costs:
        best, pick = _add_layer(best, _cheapest_by_steps(offers, unit, size_of), steps)
        picks.append(pick)
    return _trace(picks, steps, unit, size_of)


def with_the_rest(
    chosen: Sequence[Widths], costs: Sequence[Mapping[Widths, float]], budget: int, facts: CacheFacts, step: int = _REST
) -> list[Widths]:
    """What the offers, which are far apart, leave of the budget goes to the ranks of layers that cache codes, `step` at a time,
    where it is expected to save most. Numbers of 16 bits keep the ranks that attention kernels like."""
    widths, rest = list(chosen), budget - sum(map(facts.layer_bytes, chosen))
    now = [offers[each] for offers, each in zip(costs, chosen, strict=True)]
    kept = [_share_kept(offers, each, step) for offers, each in zip(costs, chosen, strict=True)]
    while True:
        gains: dict[int, float] = {}
        for layer, each in enumerate(widths):
            wider = replace(each, kv_lora_rank=each.kv_lora_rank + step)
            extra = facts.layer_bytes(wider) - facts.layer_bytes(each)
            fits = extra <= rest and wider.kv_lora_rank <= facts.full_rank and facts.can_cache(wider)
            if fits and each.latent_bits != 16:
                gains[layer] = now[layer] * (1 - kept[layer]) / extra
        if not gains:
            return widths
        best = max(gains, key=lambda layer: gains[layer])
        wider = replace(widths[best], kv_lora_rank=widths[best].kv_lora_rank + step)
        rest -= facts.layer_bytes(wider) - facts.layer_bytes(widths[best])
        widths[best], now[best] = wider, now[best] * kept[best]


def _share_kept(offers: Mapping[Widths, float], widths: Widths, step: int) -> float:
    """Of a layer's cost by `step` more ranks, as the offers that differ in the rank alone have it (geometric between them)."""
    others = [
        offer for offer in offers if replace(offer, kv_lora_rank=widths.kv_lora_rank) == widths and offer != widths
    ]
    if not others or offers[widths] <= 0:
        return widths.kv_lora_rank / (widths.kv_lora_rank + step)
    other = min(others, key=lambda offer: abs(offer.kv_lora_rank - widths.kv_lora_rank))
    steps = (other.kv_lora_rank - widths.kv_lora_rank) / step
    return float(min(1.0, (max(offers[other], 1e-300) / offers[widths]) ** (1 / steps)))


def same_widths(costs: Sequence[Mapping[Widths, float]], budget: int, size_of: Size) -> tuple[Widths, ...]:
    """The same widths for every layer that rotates, at the least summed cost; layers without rotation get the same rank.

    Raises `OptionError` that says the smallest possible budget where none fits.
    """
    rotated = [offers for offers in costs if any(widths.qk_rope_head_dim for widths in offers)] or list(costs)
    total = len(costs)
    common = set.intersection(*(set(offers) for offers in rotated))
    fitting = [widths for widths in common if size_of(widths) * total <= budget]
    if not fitting:
        raise _cannot_be_met(budget, min(map(size_of, common)) * total)
    key = lambda widths: (sum(offers[widths] for offers in rotated), size_of(widths), widths.kv_lora_rank)  # noqa: E731
    best = min(fitting, key=key)
    still = replace(best, qk_rope_head_dim=0)
    return tuple(best if any(widths.qk_rope_head_dim for widths in offers) else still for offers in costs)


def _cannot_be_met(budget: int, smallest: int) -> OptionError:
    return OptionError(
        f"a KV budget of {budget} bytes per token cannot be met; the smallest possible is {smallest}. "
        "Allow more, or lower --rank-multiple."
    )


def _cheapest_by_steps(offers: Mapping[Widths, float], unit: int, size_of: Size) -> dict[int, tuple[float, Widths]]:
    """Of the widths with the same size the cheapest, by number of steps."""
    cheapest: dict[int, tuple[float, Widths]] = {}
    for widths, cost in offers.items():
        size = size_of(widths) // unit
        if size not in cheapest or cost < cheapest[size][0]:
            cheapest[size] = (cost, widths)
    return cheapest


def _add_layer(
    best: NDArray[np.float64], cheapest: Mapping[int, tuple[float, Widths]], steps: int
) -> tuple[NDArray[np.float64], tuple[list[Widths], NDArray[np.int64]]]:
    """One row of the dynamic programme: the least cost within each budget; and the offers, with the number of the one that each
    budget takes here."""
    import numpy as np

    total = np.full(steps + 1, np.inf)
    pick = np.full(steps + 1, -1)
    sizes = [size for size in sorted(cheapest) if size <= steps]
    for number, size in enumerate(sizes):
        offered = best[: steps + 1 - size] + cheapest[size][0]
        better = offered < total[size:]
        total[size:][better] = offered[better]
        pick[size:][better] = number
    return total, ([cheapest[size][1] for size in sizes], pick)


def _trace(
    picks: Sequence[tuple[list[Widths], NDArray[np.int64]]], steps: int, unit: int, size_of: Size
) -> tuple[Widths, ...]:
    """The choices that led to the least cost, from the last layer back."""
    chosen: list[Widths] = []
    left = steps
    for offers, pick in reversed(picks):
        assert pick[left] >= 0, "the smallest budget was checked"
        widths = offers[pick[left]]
        chosen.append(widths)
        left -= size_of(widths) // unit
    return tuple(reversed(chosen))

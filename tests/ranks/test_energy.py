"""Dynamic ranks: the number of singular values within a share of the energy, rounded up to a multiple of 8."""

import numpy as np
import pytest

from xeco_convert.ranks.energy import energy_ranks

FLAT = np.ones(40)  # each value holds 1/40 of the energy


@pytest.mark.parametrize(
    ("share", "rank"),
    [(0.001, 8), (0.2, 8), (0.2001, 8), (0.224, 8), (0.225, 16), (0.4, 16), (0.43, 24), (0.99, 40), (1, 40)],
)
def test_ranks_hold_the_share_of_energy(share: float, rank: int) -> None:
    assert energy_ranks([FLAT], share) == (rank,)


def test_ranks_grow_with_the_share() -> None:
    spectrum = np.sort(np.random.default_rng(0).random(64))[::-1]
    ranks = [energy_ranks([spectrum], share)[0] for share in np.linspace(0.01, 1, 50)]
    assert ranks == sorted(ranks) and ranks[0] == 8 and ranks[-1] == 64
    assert all(rank % 8 == 0 for rank in ranks)


def test_at_least_one_value_is_kept() -> None:
    assert energy_ranks([np.array([5.0, 1.0, 0.1])], 0.01) == (3,)  # rounded up, but never above the full rank
    assert energy_ranks([np.concatenate([[100.0], np.ones(31)])], 0.01) == (8,)


def test_a_rank_never_exceeds_the_full_rank() -> None:
    assert energy_ranks([np.ones(13), np.ones(8)], 1.0) == (13, 8)


@pytest.mark.parametrize("seed", range(20))
def test_the_whole_energy_keeps_every_value(seed: int) -> None:
    """Sums of squares miss the total by rounding: no value may be lost by it."""
    spectrum = np.sort(np.random.default_rng(seed).random(37) * 10.0**seed)[::-1]
    assert energy_ranks([spectrum], 1.0) == (37,)


def test_layers_are_looked_at_one_by_one() -> None:
    steep = np.array([10.0] + [1e-3] * 39)
    assert energy_ranks([FLAT, steep, FLAT], 0.5) == (24, 8, 24)


def test_fixed_ends_take_the_given_rank() -> None:
    assert energy_ranks([FLAT] * 4, 0.5, ends=5) == (5, 24, 24, 5)
    assert energy_ranks([FLAT], 0.5, ends=5) == (5,)
    assert energy_ranks([], 0.5, ends=5) == ()


def test_a_zero_layer_gets_a_rank() -> None:
    assert energy_ranks([np.zeros(16)], 0.5)[0] in range(1, 17)

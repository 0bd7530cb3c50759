"""X-EcoMLA's dynamic rank: each layer keeps the singular values that hold a given share of its energy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RANK_MULTIPLE = 8  # as published: ranks are rounded up to a multiple of 8


def energy_ranks(spectra: Sequence[NDArray[np.float64]], share: float, *, ends: int | None = None) -> tuple[int, ...]:
    """Ranks of all layers from their singular values (each [full rank], descending).

    The number of singular values whose cumulative share of σ² stays at or below `share`, at least 1, rounded up to a
    multiple of 8, at most the full rank. With `ends`, first and last layer take that rank instead.
    """
    ranks = [_rank(np.asarray(spectrum, dtype=np.float64), share) for spectrum in spectra]
    if ends is not None and ranks:
        ranks[0] = ranks[-1] = ends
    return tuple(ranks)


def _rank(singular_values: NDArray[np.float64], share: float) -> int:
    energy = np.cumsum(singular_values**2)
    # A sum of shares misses 1 by rounding: without the slack, --energy 1 would drop the last value of some layers.
    within = int(np.count_nonzero(energy <= energy[-1] * share * (1 + 1e-12)))
    rounded = -(-max(1, within) // RANK_MULTIPLE) * RANK_MULTIPLE
    return min(rounded, singular_values.size)

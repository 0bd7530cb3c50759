"""X-EcoMLA's dynamic rank: each layer keeps the singular values that hold a given share of its energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xeco_convert.errors import OptionError
from xeco_convert.ranks.policy import RANK_POLICIES, CacheFacts, RankPolicy, Widths, WidthSurvey
from xeco_convert.settings import option, require, require_at_most

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RANK_MULTIPLE = 8  # as published: ranks are rounded up to a multiple of 8
_NEEDS_BOTH = "--fixed-ends needs both --energy (for the inner layers) and --rank (for the first and last)."


@RANK_POLICIES.add
@dataclass(frozen=True, kw_only=True)
class EnergyRanks(RankPolicy):
    """`energy`: share of the squared spectrum that each layer keeps; with `fixed_ends`, first and last layer get `rank`."""

    name = "energy"
    order = 1
    chosen_by = ("energy",)
    sentences: ClassVar[Mapping[str, str]] = {"fixed_ends": _NEEDS_BOTH}

    energy: float = option(
        "Rank per layer: keep singular values up to this share of the squared spectrum, rounded up to a multiple of 8.",
        metavar="SHARE",
        recorded=True,
    )
    fixed_ends: bool = option("With --energy: first and last layer take --rank instead.", False, recorded=True)
    rank: int | None = option("The rank of first and last layer.", metavar="N", recorded=True)

    def __post_init__(self) -> None:
        require(0 < self.energy <= 1, "--energy", "a share in (0, 1]", self.energy)
        require(self.rank is None or self.rank >= 1, "--rank", "a whole number of at least 1", self.rank)
        if self.fixed_ends and self.rank is None:
            raise OptionError(_NEEDS_BOTH)

    @classmethod
    def accepts(cls, selecting: Set[str], values: Mapping[str, Any]) -> bool:
        ends = {"rank"} if values.get("fixed_ends") else set()
        return "energy" in selecting and selecting <= {"energy", *ends}

    def check_source(self, facts: CacheFacts) -> None:
        require_at_most("--rank", self.rank, facts.full_rank, "the full rank of keys and values")

    def describe(self, facts: CacheFacts, widths: Widths, default: str) -> str:
        return f"kv_lora_rank by energy {self.energy}, qk_rope_head_dim {widths.qk_rope_head_dim}{default}"

    def widths(self, survey: WidthSurvey, facts: CacheFacts, rope_dims: Sequence[int]) -> list[Widths]:
        ranks = energy_ranks(survey.spectra(), self.energy, ends=self.rank if self.fixed_ends else None)
        return [Widths(kv_lora_rank=rank, qk_rope_head_dim=rope) for rank, rope in zip(ranks, rope_dims, strict=True)]


def energy_ranks(spectra: Sequence[NDArray[np.float64]], share: float, *, ends: int | None = None) -> tuple[int, ...]:
    """Ranks of all layers from their singular values (each [full rank], descending).

    The number of singular values whose cumulative share of σ² stays at or below `share`, at least 1, rounded up to a
    multiple of 8, at most the full rank. With `ends`, first and last layer take that rank instead.
    """
    import numpy as np  # not for --help

    ranks = [_rank(np.asarray(spectrum, dtype=np.float64), share) for spectrum in spectra]
    if ends is not None and ranks:
        ranks[0] = ranks[-1] = ends
    return tuple(ranks)


def _rank(singular_values: NDArray[np.float64], share: float) -> int:
    import numpy as np

    energy = np.cumsum(singular_values**2)
    # A sum of shares misses 1 by rounding: without the slack, --energy 1 would drop the last value of some layers.
    within = int(np.count_nonzero(energy <= energy[-1] * share * (1 + 1e-12)))
    rounded = -(-max(1, within) // RANK_MULTIPLE) * RANK_MULTIPLE
    return min(rounded, singular_values.size)

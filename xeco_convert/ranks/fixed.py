"""`--rank`: the same rank for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xeco_convert.ranks.policy import RANK_POLICIES, CacheFacts, RankPolicy, Widths, WidthSurvey
from xeco_convert.settings import option, require


@RANK_POLICIES.add
@dataclass(frozen=True, kw_only=True)
class FixedRank(RankPolicy):
    """`rank`: kv_lora_rank of every layer."""

    is_final = True
    name = "fixed"
    order = 0
    chosen_by = ("rank",)

    rank: int = option("kv_lora_rank: width of the KV latent of each layer.", metavar="N", recorded=True)

    def __post_init__(self) -> None:
        require(self.rank >= 1, "--rank", "a whole number of at least 1", self.rank)

    def rank_bound(self, full_rank: int) -> int:
        return self.rank

    def describe(self, facts: CacheFacts, widths: Widths, default: str) -> str:
        return f"kv_lora_rank {widths.kv_lora_rank}, qk_rope_head_dim {widths.qk_rope_head_dim}{default}"

    def widths(self, survey: WidthSurvey, facts: CacheFacts, rope_dims: Sequence[int]) -> list[Widths]:
        return [Widths(kv_lora_rank=self.rank, qk_rope_head_dim=rope_dim) for rope_dim in rope_dims]

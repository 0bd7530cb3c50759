"""Rank policies, one file each: which kv_lora_rank and qk_rope_head_dim every converted layer gets, and which options say so."""

from xeco_convert.ranks.policy import RANK_POLICIES, CacheFacts, RankPolicy, Widths, WidthSurvey

__all__ = ["RANK_POLICIES", "CacheFacts", "RankPolicy", "WidthSurvey", "Widths"]

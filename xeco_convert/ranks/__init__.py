"""Rank policies: each sees the layers' spectra and gives one kv_lora_rank for each layer."""

from xeco_convert.ranks.energy import energy_ranks
from xeco_convert.ranks.fixed import fixed_ranks

__all__ = ["energy_ranks", "fixed_ranks"]

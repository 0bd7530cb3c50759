"""How close one model's predictions are to another's: the output head, and one meter for perplexity, KL and top-1."""

from xeco_convert.quality.fidelity import Fidelity, FidelitySums, prediction_sums
from xeco_convert.quality.head import OutputHead

__all__ = ["Fidelity", "FidelitySums", "OutputHead", "prediction_sums"]

"""What a loss gets from student and teacher: hidden states before the vocabulary projection, never logits.

Letters: N tokens (any leading dimensions), X hidden_size, V vocabulary, K kept logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xeco_convert.quality import OutputHead


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's predictions of the next token: hidden states [..., X] after the last norm, and the head."""

    hidden: Tensor
    head: OutputHead


@dataclass(frozen=True, kw_only=True)
class TopKPrediction:
    """A teacher's most likely tokens, kept from an earlier pass: ids [..., K] int64 and their log-probabilities [..., K]
    (float, at temperature 1 over the whole vocabulary, so that what is left over is known)."""

    ids: Tensor
    log_probabilities: Tensor

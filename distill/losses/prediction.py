"""What a loss gets from student and teacher: hidden states before the vocabulary projection, never logits.

Letters: N tokens (any leading dimensions), X hidden_size, V vocabulary, K kept logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class VocabularyHead:
    """Logits of hidden states: weight [V, X] and bias [V] of one floating dtype, then a factor, then a soft cap.

    `scale` multiplies the projection (Granite divides by logits_scaling, Cohere multiplies by logit_scale); `softcap` c
    makes c · tanh(z / c) of it (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, X], in the dtype of the weight."""
        logits = functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of these logits with respect to the projection, elementwise."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1.0 - (logits / self.softcap).square())

    def cast(self, dtype: torch.dtype) -> VocabularyHead:
        """The same head in another floating dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return VocabularyHead(weight=self.weight.to(dtype), bias=bias, scale=self.scale, softcap=self.softcap)

    def first(self, vocabulary: int) -> VocabularyHead:
        """The head of the first entries of the vocabulary: rows beyond the tokenizer's are padding."""
        if vocabulary == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return VocabularyHead(weight=self.weight[:vocabulary], bias=bias, scale=self.scale, softcap=self.softcap)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's predictions of the next token: hidden states [..., X] after the last norm, and the head."""

    hidden: Tensor
    head: VocabularyHead


@dataclass(frozen=True, kw_only=True)
class TopKPrediction:
    """A teacher's most likely tokens, kept from an earlier pass: ids [..., K] int64 and their log-probabilities [..., K]
    (float, at temperature 1 over the whole vocabulary, so that what is left over is known)."""

    ids: Tensor
    log_probabilities: Tensor

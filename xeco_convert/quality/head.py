"""The output head: logits of hidden states, as the model's own forward computes them.

Letters: n tokens, X hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xeco_convert.families import supported_model_types
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """Weight [V, X] and bias [V] of one floating dtype; then what the family does to logits: they are divided by `divisor`
    (Granite), and capped, cap · tanh(z / cap), at `softcap` (Gemma 2). `norm`: the last norm, where hidden states are those
    before it."""

    weight: Tensor
    bias: Tensor | None = None
    norm: nn.Module | None = None
    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of_model(cls, model: Any) -> OutputHead:
        """The head of a causal language model, over hidden states behind its last norm. What its forward does to the logits is
        known of families, converted or not; of other models (as teachers) by the fields that transformers has for it."""
        head = model.get_output_embeddings()
        divisor, softcap = _after_projection(model.config)
        return cls(weight=head.weight, bias=getattr(head, "bias", None), divisor=divisor, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, X], in the dtype of the weight."""
        states = hidden if self.norm is None else self.norm(hidden)
        logits = functional.linear(states, self.weight, self.bias)
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of these logits with respect to the projection, elementwise."""
        scale = 1.0 / self.divisor
        return scale if self.softcap is None else scale * (1.0 - (logits / self.softcap).square())

    def cast(self, dtype: torch.dtype) -> OutputHead:
        """The same head in another floating dtype."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def first(self, vocabulary: int) -> OutputHead:
        """The head of the first entries of the vocabulary: rows beyond the tokenizer's are padding."""
        if vocabulary == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)


def _after_projection(config: Any) -> tuple[float, float | None]:
    """(divisor, soft cap) of the logits."""
    family = supported_model_types().get(str(config.model_type).removeprefix(MODEL_TYPE_PREFIX))
    values = vars(config)
    if family is not None:
        return family.logits_scale(values), family.logits_cap(values)
    factor = float(values.get("logit_scale") or 1.0)  # Cohere
    return float(values.get("logits_scaling") or 1.0) / factor, values.get("final_logit_softcapping")

"""The one meter: perplexity of two models, KL divergence and top-1 agreement, from sums over predictions.

Letters: W windows, T tokens, n predictions, X hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.errors import VerificationError
from xeco_convert.quality.head import OutputHead

_LARGEST_SHARE = 1 / 40  # of tokens, whose divergence is cut off where models are compared on few
_CHUNK_TOKENS = 128  # logits of a vocabulary of 128k for this many tokens take 64 MB


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How close a converted model is to its source, over num_tokens predictions.

    Perplexities are exp of the mean negative log-likelihood; `kl` is the mean of KL(source ‖ converted) over predictions,
    in nats per token; `top1` the share of predictions whose most likely token is the same.
    """

    perplexity_source: float
    perplexity: float
    kl: float
    top1: float
    num_tokens: int
    num_windows: int

    @property
    def gap(self) -> float:
        """What the conversion costs, in nats per token: ln(perplexity / perplexity_source)."""
        return math.log(self.perplexity / self.perplexity_source)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, the gap with them."""
        return asdict(self) | {"gap": self.gap}


def prediction_sums(source_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over n predictions, float64 [5] on the CPU: negative log-likelihood of the source, of the other model, KL(source ‖
    other), predictions with the same most likely token, predictions. Logits [n, V] on any devices, targets [n]."""
    source_logp = functional.log_softmax(source_logits.float(), dim=-1).to(logits.device)
    logp = functional.log_softmax(logits.float(), dim=-1)
    column = targets.to(logits.device)[:, None]
    divergence = _divergence(source_logp, logp)
    agreeing = source_logp.argmax(dim=-1) == logp.argmax(dim=-1)
    parts = [-source_logp.gather(1, column), -logp.gather(1, column), divergence, agreeing, torch.ones_like(agreeing)]
    return torch.stack([part.cpu().double().sum() for part in parts])  # some accelerators have no float64


def _divergence(source_logp: Tensor, logp: Tensor) -> Tensor:
    """KL(source ‖ other) [n] from log-probabilities [n, V]."""
    probability = source_logp.exp()
    # where both give a token no chance at all (-inf), p·(ln p - ln q) is 0, not NaN
    return torch.where(probability > 0, probability * (source_logp - logp), 0.0).sum(dim=-1)


class FidelitySums:
    """Sums of predictions from many places: chunks, batches, processes."""

    def __init__(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)

    @property
    def num_tokens(self) -> int:
        """Predictions so far."""
        return int(self._sums[4])

    @property
    def nan_in(self) -> str | None:
        """Which of the models gave NaN, if one did."""
        names = ("source", "converted model")
        return next((name for name, loss in zip(names, self._sums, strict=False) if bool(loss.isnan())), None)

    def add(self, sums: Tensor) -> None:
        """Take in what `prediction_sums` gives."""
        self._sums += sums

    def add_all_processes(self, device: torch.device) -> None:
        """The sums of all processes of a distributed run, in each of them; float32 on `device`, as its backend needs."""
        total = self._sums.to(device, torch.float32)
        torch.distributed.all_reduce(total)
        self._sums = total.double().cpu()

    def fidelity(self, num_windows: int) -> Fidelity:
        """The means. Raises `VerificationError` where a sum is not a number."""
        if self.nan_in is not None:
            raise VerificationError(
                f"fidelity: the {self.nan_in} gives NaN on these windows, expected finite logits; load it in float32, "
                "and check its weights."
            )
        source_loss, loss, kl, agreeing, count = self._sums.tolist()
        return Fidelity(
            perplexity_source=perplexity(source_loss / count),
            perplexity=perplexity(loss / count),
            kl=max(0.0, kl / count),  # rounding may take the divergence of two equal models just below zero
            top1=agreeing / count,
            num_tokens=int(count),
            num_windows=num_windows,
        )


@torch.no_grad()
def stream_fidelity(head: OutputHead, source: Tensor, converted: Tensor, ids: Tensor, counts: Tensor) -> Fidelity:
    """Compare final hidden states [W, T, X] of both models on windows of token ids [W, T], of which `counts` count.

    A token's prediction is measured where it and the next token count. Raises `ValueError` where none does.
    """
    predicting = counts[:, :-1] & counts[:, 1:]
    source_nX, converted_nX = source[:, :-1][predicting], converted[:, :-1][predicting]
    targets = ids[:, 1:].to(predicting.device)[predicting]
    if targets.numel() == 0:
        raise ValueError("no token to measure on")
    sums = FidelitySums()
    for start in range(0, targets.numel(), _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        sums.add(prediction_sums(head.logits(source_nX[part]), head.logits(converted_nX[part]), targets[part]))
    return sums.fidelity(ids.shape[0])


@torch.no_grad()
def stream_divergences(
    head: OutputHead, source: Tensor, others: Sequence[Tensor], counts: Tensor, most_tokens: int
) -> list[float]:
    """Mean KL(source ‖ other) of many models' final hidden states [W, T, X] on the tokens that count, at most about
    `most_tokens` of them, evenly spread: the source's logits are computed once. Of each model the largest fortieth counts as
    what it begins with: single tokens, of hundreds, would decide the mean."""
    places = counts.flatten().nonzero()[:, 0]
    places = places[:: max(1, -(-places.numel() // most_tokens))]
    # made beforehand: what is left behind between logits keeps the memory of those that are gone from being used whole
    found = source.new_empty(len(others), places.numel(), dtype=torch.float64)
    for start in range(0, places.numel(), _CHUNK_TOKENS):
        chunk = places[start : start + _CHUNK_TOKENS]
        source_logp = functional.log_softmax(head.logits(source.flatten(0, 1)[chunk]).float(), dim=-1)
        for number, other in enumerate(others):
            logp = functional.log_softmax(head.logits(other.flatten(0, 1)[chunk]).float(), dim=-1)
            found[number, start : start + chunk.numel()] = _divergence(source_logp, logp)
    return [_winsorised_mean(each) for each in found]


def _winsorised_mean(divergences: Tensor) -> float:
    most = divergences.quantile(1 - _LARGEST_SHARE)
    return max(0.0, float(divergences.clamp_max(most).mean()))


def perplexity(mean_loss: float) -> float:
    """exp without its OverflowError: a broken model has an infinite perplexity."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf

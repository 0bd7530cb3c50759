"""How close the converted model is to its source at the output, from the final hidden states of both streams."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from xeco_convert.calibration.stream import OutputHead

_CHUNK_TOKENS = 128  # logits of a vocabulary of 128k for this many tokens take 64 MB


@dataclass(frozen=True, kw_only=True)
class StreamFidelity:
    """Step-0 quality on calibration text that was not calibrated on. `kl`: KL(source ‖ converted), nats per token."""

    perplexity_source: float
    perplexity: float
    kl: float
    top1: float
    num_tokens: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


@torch.no_grad()
def stream_fidelity(head: OutputHead, source: Tensor, converted: Tensor, ids: Tensor, counts: Tensor) -> StreamFidelity:
    """Compare final hidden states [W, T, X] of both models on windows of token ids [W, T], of which `counts` count.

    A token's prediction is measured where it and the next token count. Raises `ValueError` where none does.
    """
    predicting = counts[:, :-1] & counts[:, 1:]
    source_nT, converted_nT = source[:, :-1][predicting], converted[:, :-1][predicting]
    targets = ids[:, 1:].to(predicting.device)[predicting]
    if targets.numel() == 0:
        raise ValueError("no token to measure on")
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, targets.numel(), _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        reference, found = head.log_probabilities(source_nT[part]), head.log_probabilities(converted_nT[part])
        wanted = targets[part, None]
        sums += torch.stack(
            [
                -reference.gather(1, wanted).sum().double().cpu(),
                -found.gather(1, wanted).sum().double().cpu(),
                (reference.exp() * (reference - found)).sum().double().cpu(),
                (reference.argmax(1) == found.argmax(1)).sum().double().cpu(),
            ]
        )
    nll_source, nll, kl, top1 = (sums / targets.numel()).tolist()
    return StreamFidelity(
        perplexity_source=math.exp(nll_source),
        perplexity=math.exp(nll),
        kl=kl,
        top1=top1,
        num_tokens=targets.numel(),
    )

"""How close the converted model is to its source at the output, from the final hidden states of both streams."""

from __future__ import annotations

import torch
from torch import Tensor

from xeco_convert.calibration.stream import OutputHead
from xeco_convert.evaluate import Fidelity, FidelitySums

_CHUNK_TOKENS = 128  # logits of a vocabulary of 128k for this many tokens take 64 MB


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
        sums.add(head.logits(source_nX[part]), head.logits(converted_nX[part]), targets[part])
    return sums.fidelity(ids.shape[0])

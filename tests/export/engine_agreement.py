"""What trained models are asked to go on with by every engine, and when its text is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the park to play with a big red ball.",
    "The old man looked at the sea and",
    "One day, a small bird fell from the tree. It was",
    '"Can I have a cookie?" asked Ben. His mom',
)


@torch.no_grad()
def assert_greedy(
    model: Any, row: Sequence[int], tokens: Sequence[int], bound: float, left_out: Sequence[int] = ()
) -> Tensor:
    """Each of the tokens that follow `row` is the likeliest to `model` behind the same text, or one within `bound` of it, and few
    are not the likeliest itself: which of two that are nearly as likely comes first is left to rounding. `left_out`: tokens
    that the engine never gives. Returns the log-probabilities of all tokens at each step."""
    ids = torch.tensor([[*row, *tokens]])
    logprobs: Tensor = model(ids).logits[0, len(row) - 1 : -1].log_softmax(-1)
    offered = logprobs.index_fill(1, torch.tensor(list(left_out), dtype=torch.int64), -torch.inf)
    likeliest, chosen = offered.amax(-1), logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((likeliest - chosen).max()) < bound
    assert int((likeliest == chosen).sum()) >= 0.95 * len(tokens)
    return logprobs

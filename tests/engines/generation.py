"""What an engine generates beside what this project's own model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xeco_convert.pretrained import load_causal_lm

LOGPROB_BOUND = (
    2e-2  # both compute in float32, and differ by about 1e-5; a wrong rotation or scale is off by more than 1
)
Run = Callable[..., list[dict[str, Any]]]


@torch.no_grad()
def own_generation(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """The same from this project's own model in transformers, float32."""
    model = load_causal_lm(folder, torch.float32).eval()
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=max_tokens,
            max_new_tokens=max_tokens,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps = [logits[0].log_softmax(-1) for logits in output.logits]
        tops = [{str(token): float(step[token]) for token in step.topk(5).indices.tolist()} for step in steps]
        results.append({"ids": output.sequences[0, len(prompt) :].tolist(), "logprobs": tops})
    return results


def assert_same_generation(expected: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Equal greedy tokens, and log-probabilities within the bound at every step; returns how many tokens, and the largest
    difference of log-probabilities."""
    assert "error" not in found, found["error"]
    assert len(found["requests"]) == len(expected)
    worst = 0.0
    for ours, theirs in zip(expected, found["requests"], strict=True):
        assert theirs["ids"] == ours["ids"]
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            shared = mine.keys() & other.keys()
            assert len(shared) >= 4
            worst = max(worst, *(abs(mine[token] - other[token]) for token in shared))
    assert worst < LOGPROB_BOUND
    return {"tokens": sum(len(ours["ids"]) for ours in expected), "logprob_difference": worst}

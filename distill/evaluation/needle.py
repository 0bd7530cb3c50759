"""Needle in a haystack: does the model find what stands far back? Long context is where converted models lose first.

A fact with a number nobody can guess stands at some depth of running text; at the end the text begins to say it again. The
answer counts as found where every token of it is the most likely one; the mean of −ln p over its tokens tells more, and
tells it of models too small to find anything. Source of the idea: G. Kamradt, LLMTest_NeedleInAHaystack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.errors import OptionError

from ..errors import DataError
from ..teacher import hidden_states, output_head

_NAMES = ("Lily", "Tom", "Sara", "Ben", "Anna", "Max")
_SAYS = "The secret number of {name} is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Token ids [n] int64 whose last `num_answer` are the answer: they are to be predicted from what is before them, and count
    as found where each is the most likely one."""

    ids: Tensor
    num_answer: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Over the trials of one context length: share found, and nats per answer token."""

    accuracy: float
    nats: float


def make_trial(tokenizer: Any, haystack: Sequence[int], context: int, depth: float, seed: int) -> Trial:
    """A needle at `depth` (0: the start) of `context` tokens in all. Raises `OptionError` where it does not fit."""
    chance = random.Random(seed)
    name, number = chance.choice(_NAMES), chance.randrange(10_000, 100_000)
    encode: Callable[[str], list[int]] = lambda text: list(  # noqa: E731
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    )
    question = encode(f" {_SAYS.format(name=name)}")
    # the answer's tokens as they follow the question: some tokenizers join a space with what follows it
    answer = encode(f" {_SAYS.format(name=name)} {number}")[len(question) :]
    needle = [*question, *answer, *encode(".")]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = context - len(bos) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise OptionError(
            f"--contexts: expected at least {context - room} tokens (the needle and its question), found {context}; choose "
            "longer contexts."
        )
    before = round(room * depth)
    ids = [*bos, *haystack[:before], *needle, *haystack[before:room], *question, *answer]
    return Trial(ids=torch.tensor(ids), num_answer=len(answer))


def trials(tokenizer: Any, haystack: Sequence[int], context: int, per_depth: int, seed: int) -> list[Trial]:
    """Needles at all depths. Raises `DataError` where the haystack is too short."""
    if len(haystack) < context:
        raise DataError(
            f"needle: expected {context} tokens of text to hide it in, found {len(haystack)}; give more --data."
        )
    found = []
    for number in range(per_depth):
        start = (number * context) % max(1, len(haystack) - context + 1)
        part = haystack[start : start + context]
        found += [
            make_trial(tokenizer, part, context, depth, seed + 1000 * number + place)
            for place, depth in enumerate(DEPTHS)
        ]
    return found


@torch.no_grad()
def retrieval(model: Any, given: Sequence[Trial]) -> Retrieval:
    """How much of it a model finds; one trial at a time."""
    device = next(model.parameters()).device
    head = output_head(model)
    hits, nats, tokens = 0, 0.0, 0
    for trial in given:
        ids = trial.ids.to(device)
        hidden = hidden_states(model, ids[None, :-1], None)[0, -trial.num_answer :]
        logp = functional.log_softmax(head.logits(hidden.to(head.weight.dtype)).float(), dim=-1)
        answer = ids[-trial.num_answer :]
        hits += int((logp.argmax(dim=-1) == answer).all())
        nats -= float(logp.gather(1, answer[:, None]).sum())
        tokens += trial.num_answer
    return Retrieval(accuracy=hits / len(given), nats=nats / tokens)

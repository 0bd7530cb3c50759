"""Zero-shot scores of a model on task files, as `xeco-distill eval --tasks` counts them, with batches as large as memory lets.

lm-eval asks for a few rows at a time; a benchmark of many models has no time for that. The formulas are the same, which a test
shows: log-likelihood of what follows given what stands before, without special tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xeco_distill.evaluation.task_files import TaskFile, means, read_task, task_files

_BATCH_TOKENS = 32_768


class Request(NamedTuple):
    """Text that follows a context, and how many characters it counts as."""

    context: str
    continuation: str
    characters: int


def score_folder(model: Any, tokenizer: Any, folder: Path, limit: int | None) -> dict[str, Any]:
    """`tasks`: acc and acc_norm with their standard errors for every file of a folder, of at most `limit` rows each, evenly
    spread; `mean` over them."""
    files = [read_task(path) for path in task_files(folder).values()]
    tasks = {file.name: score(model, tokenizer, _spread(file, limit)) for file in files}
    return {"tasks": tasks, "mean": means(tasks)}


def score(model: Any, tokenizer: Any, task: TaskFile) -> dict[str, float]:
    """One task. The model computes where it is, in its dtype."""
    asked = [_requests(row) for row in task.rows]
    flat = iter(log_likelihoods(model, tokenizer, [request for requests, _ in asked for request in requests]))
    right, right_normed = [], []
    for requests, answer in asked:
        found = [next(flat) for _ in requests]
        if len(requests) == 1:
            right.append(found[0][1])
            continue
        sums = [total for total, _ in found]
        normed = [total / request.characters for total, request in zip(sums, requests, strict=True)]
        right.append(sums.index(max(sums)) == answer)
        right_normed.append(normed.index(max(normed)) == answer)
    results = {"rows": float(len(task.rows)), **_accuracy("acc", right)}
    return results | (_accuracy("acc_norm", right_normed) if task.form == "choices" else {})


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Of each continuation, and whether every token of it is the most likely one."""
    coded = [_encode(tokenizer, request) for request in requests]
    order = sorted(range(len(coded)), key=lambda number: -len(coded[number][1]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(coded)
    device, head = next(model.parameters()).device, model.get_output_embeddings()
    while order:
        width = len(coded[order[0]][1])
        group, order = order[: max(1, _BATCH_TOKENS // width)], order[max(1, _BATCH_TOKENS // width) :]
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        for row, number in enumerate(group):
            whole = coded[number][1]
            ids[row, : len(whole)] = torch.tensor(whole)
        hidden = model.base_model(
            ids.to(device), use_cache=False
        ).last_hidden_state  # padding stands behind: never seen
        places = [(max(1, len(coded[number][0])), len(coded[number][1])) for number in group]
        chosen = torch.cat([hidden[row, start - 1 : end - 1] for row, (start, end) in enumerate(places)])
        targets = torch.cat([ids[row, start:end] for row, (start, end) in enumerate(places)]).to(device)
        parts = [_of_tokens(head, h, t) for h, t in zip(chosen.split(4096), targets.split(4096), strict=True)]
        sizes = [end - start for start, end in places]
        logp, best = (torch.cat(values).cpu().split(sizes) for values in zip(*parts, strict=True))
        for number, one, agreeing in zip(group, logp, best, strict=True):
            results[number] = (float(one.double().sum()), bool(agreeing.all()))
    return results


def _of_tokens(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head(hidden).float()
    logp = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return logp, logits.argmax(dim=-1) == targets


def _requests(row: Mapping[str, Any]) -> tuple[list[Request], int]:
    """What a row asks for, and which of them is right."""
    if "target" in row:
        return [Request(row["context"], row["target"], len(row["target"]))], 0
    if "contexts" in row:
        text = row["continuation"]
        return [Request(context, text, len(text)) for context in row["contexts"]], row["answer"]
    # the space before a choice is none of its characters
    return [Request(row["context"], choice, max(1, len(choice) - 1)) for choice in row["choices"]], row["answer"]


def _encode(tokenizer: Any, request: Request) -> tuple[list[int], list[int]]:
    """Tokens of the context and of both; spaces at the end of the context belong to what follows."""
    stripped = request.context.rstrip()
    ids = [
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (stripped, request.context + request.continuation)
    ]
    return ids[0], ids[1]


def _spread(task: TaskFile, limit: int | None) -> TaskFile:
    if limit is None or len(task.rows) <= limit:
        return task
    return TaskFile(name=task.name, form=task.form, rows=task.rows[:: len(task.rows) // limit][:limit])


def _accuracy(name: str, right: Sequence[bool]) -> dict[str, float]:
    share = sum(right) / len(right)
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, len(right) - 1))}

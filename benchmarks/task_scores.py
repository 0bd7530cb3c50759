"""Zero-shot scores of a model on task files, as `xeco-distill eval --tasks` counts them, in two fifths of the tokens.

lm-eval runs each choice with its context by itself; a benchmark of many models has no time for that. Here the choices of a row
share what they have in common: its sequences become a tree, in which every token sees those on its own way from the root. The
formulas are the same, which a test shows: log-likelihood of what follows given what stands before, without special tokens.
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
    scored = log_likelihoods(model, tokenizer, [requests for requests, _ in asked])
    right, right_normed = [], []
    for (requests, answer), found in zip(asked, scored, strict=True):
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
def log_likelihoods(model: Any, tokenizer: Any, rows: Sequence[Sequence[Request]]) -> list[list[tuple[float, bool]]]:
    """Of each continuation of each row, and whether every token of it is the most likely one."""
    trees = [_Tree([_encode(tokenizer, request) for request in requests]) for requests in rows]
    order = sorted(range(len(trees)), key=lambda number: -len(trees[number].ids))
    results: list[list[tuple[float, bool]]] = [[] for _ in rows]
    device, head = next(model.parameters()).device, model.get_output_embeddings()
    while order:
        count = max(1, _BATCH_TOKENS // len(trees[order[0]].ids))
        group, order = order[:count], order[count:]
        ids, positions, mask = _batch([trees[number] for number in group])
        hidden = model.base_model(
            ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=False
        ).last_hidden_state
        asked = [(number, row, *each) for row, number in enumerate(group) for each in trees[number].asked]
        chosen = torch.cat([hidden[row, nodes] for _, row, nodes, _ in asked])
        targets = torch.tensor([target for *_, following in asked for target in following], device=device)
        parts = [_of_tokens(head, h, t) for h, t in zip(chosen.split(4096), targets.split(4096), strict=True)]
        sizes = [len(nodes) for _, _, nodes, _ in asked]
        logp, best = (torch.cat(values).cpu().split(sizes) for values in zip(*parts, strict=True))
        for (number, *_), one, agreeing in zip(asked, logp, best, strict=True):
            results[number].append((float(one.double().sum()), bool(agreeing.all())))
    return results


class _Tree:
    """Sequences with what they share at their beginning only once.

    `ids` of the nodes, their `positions` in their sequences and the node before each (`parents`, -1 at the root); `asked`: for
    every sequence the nodes that predict what follows its context, and those tokens.
    """

    def __init__(self, coded: Sequence[tuple[list[int], list[int]]]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.parents: list[int] = []
        self.asked: list[tuple[list[int], list[int]]] = []
        known: dict[tuple[int, int], int] = {}  # by the node before and the token
        for context, whole in coded:
            nodes = [-1]
            for position, token in enumerate(whole[:-1]):
                key = nodes[-1], token
                if key not in known:
                    known[key] = len(self.ids)
                    self.ids.append(token)
                    self.positions.append(position)
                    self.parents.append(nodes[-1])
                nodes.append(known[key])
            start = max(1, len(context))
            self.asked.append((nodes[start:], whole[start:]))


def _batch(trees: Sequence[_Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and positions [B, T], and what each node sees [B, 1, T, T]: itself and all before it; nothing sees the padding."""
    width = len(trees[0].ids)
    ids, positions = (torch.zeros(len(trees), width, dtype=torch.int64) for _ in range(2))
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = torch.tensor(tree.ids)
        positions[row, : len(tree.ids)] = torch.tensor(tree.positions)
        seen = mask[row, 0]
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
    return ids, positions, mask


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

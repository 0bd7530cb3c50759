"""Zero-shot tasks in files, one row a line: read and checked, and handed to lm-eval as tasks of its own kind.

A row is one of three forms, and all rows of a file have the same:

    {"context": str, "choices": [str, …], "answer": int}            which choice follows the context
    {"contexts": [str, …], "continuation": str, "answer": int}      which context the continuation follows
    {"context": str, "target": str}                                 whether the target is what the model says

Texts are put together as they stand: what follows begins with a space. `answer` counts from 0. Further keys may stand there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.errors import OptionError

from ..errors import DataError

# Whose accuracy is normalised by the length of the choice in the mean, as published tables have it.
NORMALISED = ("arc_challenge", "hellaswag", "openbookqa")
BESIDE = "mmlu"  # with a mean of its own without it: at chance in small models
_CHOICES, _CONTEXTS, _TARGET = "choices", "contexts", "target"
_FORMS = (
    '{"context", "choices", "answer"}, {"contexts", "continuation", "answer"} or {"context", "target"}, '
    "the same in all rows"
)


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A task: its name, the key that tells its form (choices, contexts or target), and its rows."""

    name: str
    form: str
    rows: Sequence[Mapping[str, Any]]


def task_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that can be tasks, NAME.jsonl by NAME. Raises `OptionError` where there is no such folder."""
    if not folder.is_dir():
        raise OptionError(f"--include-tasks: expected a folder, found none at {folder}; check the path.")
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def read_task(file: Path, limit: int | None = None) -> TaskFile:
    """The task in a file: all rows, or `limit` of them evenly spread.

    Raises `DataError` for a row of another form (file, line, what was found), `OptionError` where there are fewer rows than
    `limit`.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected a task of one JSON object a line, in UTF-8 ({error}).") from None
    rows: list[dict[str, Any]] = []
    form = None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(f"{file}:{number}", line, form))
            form = form or _form(rows[0])
    if form is None or (limit is not None and len(rows) < limit):
        raise OptionError(
            f"--limit: expected at least {limit or 1} rows in {file}, found {len(rows)}; lower --limit or leave it out for all."
        )
    if limit is not None:  # a file may be sorted, by subject for one
        rows = rows[:: len(rows) // limit][:limit]
    return TaskFile(name=file.stem, form=form, rows=rows)


def lm_eval_task(task: TaskFile) -> Any:
    """The task as one of lm-eval's, which asks and scores."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = [{key: row[key] for key in _KEYS[task.form]} for row in task.rows]

    class RowsInMemory(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": Dataset.from_list(rows)}

    return RowsInMemory(config=_config(task))


def _config(task: TaskFile) -> dict[str, Any]:
    """Its fields, as a YAML file of lm-eval's would have them."""
    config: dict[str, Any] = {"task": task.name, "test_split": "test"}
    if task.form == _TARGET:
        config |= {"output_type": "loglikelihood", "doc_to_text": _field("context"), "doc_to_target": _field("target")}
        config["metric_list"] = [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            # lm-eval's own takes no name: its standard error comes from a pool of processes
            {"metric": "perplexity", "aggregation": _perplexity, "higher_is_better": False},
        ]
        return config
    metrics, config["output_type"] = ["acc"], "multiple_choice"
    if task.form == _CONTEXTS:
        config |= {"doc_to_choice": _field("contexts"), "doc_to_text": _field("answer")}
        config |= {"doc_to_target": _field("continuation"), "target_delimiter": ""}
    else:
        # the space belongs to no choice where its characters are counted
        config |= {"doc_to_choice": lambda row: [choice[1:] for choice in row["choices"]], "target_delimiter": " "}
        config |= {"doc_to_text": _field("context"), "doc_to_target": _field("answer")}
        metrics.append("acc_norm")
    config["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]
    return config


def means(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean accuracy over tasks in files with its standard error, and the same without mmlu where that is one of several.

    Of a task in `NORMALISED` the accuracy normalised by length counts, of others the plain one.
    """
    found: dict[str, float] = {}
    for label, names in (("mean", list(tasks)), (f"mean_without_{BESIDE}", [name for name in tasks if name != BESIDE])):
        if names and (label == "mean" or 0 < len(names) < len(tasks)):
            chosen = [
                ("acc_norm" if name in NORMALISED and "acc_norm" in tasks[name] else "acc", name) for name in names
            ]
            found[label] = sum(tasks[name][metric] for metric, name in chosen) / len(chosen)
            errors = [tasks[name][f"{metric}_stderr"] for metric, name in chosen]
            found[f"{label}_stderr"] = math.sqrt(sum(error * error for error in errors)) / len(chosen)
    return found


_KEYS = {
    _CHOICES: ("context", "choices", "answer"),
    _CONTEXTS: ("contexts", "continuation", "answer"),
    _TARGET: ("context", "target"),
}


def _form(row: object) -> str | None:
    return next((form for form, keys in _KEYS.items() if isinstance(row, dict) and set(keys) <= set(row)), None)


def _row(place: str, line: str, expected_form: str | None) -> dict[str, Any]:
    """One row, checked, of `expected_form` where that is known."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: expected a JSON object, found {line.strip()!r:.40} ({error}).") from None
    form = _form(row)
    if form is None or form != (expected_form or form):
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else repr(row)
        raise DataError(f"{place}: expected a row of a task, {_FORMS}; found {keys:.80}.")
    for key in _KEYS[form]:
        if key != "answer":
            _check_texts(f"{place}: {key}", row[key], key)
    if form != _TARGET and (type(row["answer"]) is not int or not 0 <= row["answer"] < len(row[form])):
        raise DataError(
            f"{place}: answer: expected a number from 0 to {len(row[form]) - 1}, found {row['answer']!r:.40}."
        )
    return dict(row)


def _check_texts(place: str, value: object, key: str) -> None:
    """A text, or several in a list; those that follow a context begin with a space."""
    if key in (_CHOICES, _CONTEXTS) and (not isinstance(value, list) or len(value) < 2):
        raise DataError(f"{place}: expected a list of at least two texts, found {value!r:.60}.")
    follows = key in (_CHOICES, "continuation", _TARGET)
    for text in value if isinstance(value, list) and key in (_CHOICES, _CONTEXTS) else [value]:
        if not isinstance(text, str) or len(text) < 1 + follows or (follows and not text.startswith(" ")):
            kind = "a text that begins with a space and says more" if follows else "a text"
            raise DataError(f"{place}: expected {kind}, found {text!r:.60}.")


def _field(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """What reads a field of a row: a plain name would be a template to lm-eval where a dataset lacks it."""
    return lambda row: row[name]


def _perplexity(loglikelihoods: Sequence[float]) -> float:
    """Of a whole target: exp of the mean of −ln p."""
    return math.exp(-sum(loglikelihoods) / len(loglikelihoods))

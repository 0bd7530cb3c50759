"""Tasks of EleutherAI's lm-evaluation-harness on a model (extra [eval]), and tasks in files, scored by it without a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.errors import OptionError

from .task_files import TaskFile, lm_eval_task, means, read_task, task_files

_BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What --tasks names: lm-eval's tasks, found by `manager`, and tasks in files, read and checked."""

    names: Sequence[str]
    files: Sequence[TaskFile]
    manager: Any
    limit: int | None


def find_tasks(names: Sequence[str], include: Path | None, limit: int | None) -> Tasks:
    """The tasks by name or pattern: first those of the folder `include`, in lm-eval's YAML and in files, then lm-eval's own.

    Raises `OptionError` without the library and for tasks that it does not know, `DataError` for files of another form.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise OptionError("--tasks needs lm-eval: pip install 'xeco-convert[eval]'.") from None
    manager, own, chosen, unknown = None, [], [], list(names)
    if include is not None:  # alone first: reading the thousands of tasks that come with lm-eval takes half a minute
        paths = task_files(include)
        manager = TaskManager(include_path=str(include), include_defaults=False)
        own = [name for name in names if manager.match_tasks([name])]
        chosen = [stem for stem in paths if not manager.match_tasks([stem]) and _matches(stem, names)]
        unknown = [name for name in names if name not in own and not fnmatch.filter(chosen, name)]
    if manager is None or unknown:
        manager = TaskManager(include_path=None if include is None else str(include))
        own += [name for name in unknown if manager.match_tasks([name])]
        unknown = [name for name in unknown if name not in own]
    if unknown or not names:
        raise OptionError(
            f"--tasks: lm-eval knows no {', '.join(unknown) or 'task without a name'}; `lm-eval ls tasks` lists them, "
            "--include-tasks adds a folder."
        )
    files = [read_task(paths[stem], limit) for stem in chosen]
    return Tasks(names=own, files=files, manager=manager, limit=limit)


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks) -> dict[str, Any]:
    """`tasks`: metrics by task and name, standard errors beside them; `tasks_mean` over those in files; `lm_eval`: its version.

    The model computes where it is, in its dtype. Tasks in files are taken as text alone, without special tokens.
    """
    import importlib.metadata

    results: dict[str, Any] = {"tasks": {}, "lm_eval": importlib.metadata.version("lm_eval")}
    if tasks.files:
        results["tasks"] = file_scores(model, tokenizer, tasks.files)
        results["tasks_mean"] = means(results["tasks"])
    if tasks.names:
        results["tasks"] |= _evaluate(
            _wrapped(model, tokenizer), list(tasks.names), tasks.manager, limit=tasks.limit, bootstrap_iters=0
        )
    return results


def file_scores(model: Any, tokenizer: Any, tasks: Sequence[TaskFile]) -> dict[str, dict[str, float]]:
    """Of every task acc, acc_norm where choices differ in length, or perplexity; standard errors, and rows scored."""
    from lm_eval.tasks import TaskManager

    wrapped = _wrapped(model, tokenizer, add_bos_token=False)
    own, manager = [lm_eval_task(task) for task in tasks], TaskManager(include_defaults=False)
    # any number above 0 has lm-eval compute the standard error of a mean, which needs no bootstrap
    scores = _evaluate(wrapped, own, manager, limit=None, bootstrap_iters=1)
    return {task.name: scores[task.name] | {"rows": len(task.rows)} for task in tasks}


def _wrapped(model: Any, tokenizer: Any, add_bos_token: bool | None = None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH_SIZE, add_bos_token=add_bos_token)


def _evaluate(
    model: Any, tasks: Sequence[Any], manager: Any, *, limit: int | None, bootstrap_iters: int
) -> dict[str, dict[str, float]]:
    import lm_eval

    results: Any = lm_eval.simple_evaluate(
        model=model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=bootstrap_iters
    )
    return {task: _metrics(values) for task, values in results["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" as acc; what it could not compute ("N/A") is left out."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float))
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

"""Tasks of EleutherAI's lm-evaluation-harness on a converted checkpoint (extra [eval])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xeco_convert.errors import OptionError


def run_tasks(
    folder: Path, tasks: list[str], *, include: Path | None, limit: int | None, batch_size: int, device: str
) -> tuple[dict[str, dict[str, float]], str]:
    """Metrics by task and name, and the harness's version.

    `include`: folder with further task files. Raises `OptionError` without the library, and for tasks that it does not know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise OptionError("--tasks needs lm-eval: pip install 'xeco-convert[eval]'.") from None
    import importlib.metadata

    import xeco_convert  # noqa: F401  registers the converted families

    manager, unknown = None, tasks
    if include is not None:  # alone first: reading the thousands of tasks that come with lm-eval takes half a minute
        manager = TaskManager(include_path=str(include), include_defaults=False)
        unknown = _unknown(manager, tasks)
    if manager is None or unknown:
        manager = TaskManager(include_path=None if include is None else str(include))
        unknown = _unknown(manager, tasks)
    if unknown:
        raise OptionError(
            f"--tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists them, --include-tasks adds a folder."
        )
    model = HFLM(pretrained=str(folder), dtype="auto", device=device, batch_size=batch_size)
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
    )
    metrics = {
        task: {key.partition(",")[0]: float(value) for key, value in values.items() if _is_metric(key, value)}
        for task, values in found["results"].items()
    }
    return metrics, importlib.metadata.version("lm_eval")


def _unknown(manager: Any, tasks: list[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, (int, float))

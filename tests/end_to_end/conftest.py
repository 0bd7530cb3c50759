"""The installed commands, run as a user runs them, and what they made of the real checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Converted, Runner


@pytest.fixture(scope="session")
def run() -> Runner:
    """run("xeco-convert", "in", "out", ..., code=0, environment={...}): the finished process; another code fails the test."""

    def run_command(
        *arguments: object, code: int = 0, environment: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / str(arguments[0])
        done = subprocess.run(
            [str(program), *map(str, arguments[1:])],
            env={**os.environ, "COLUMNS": "100", **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done

    return run_command


def convert_by_command(run: Runner, source: Path, base: Path, *options: object) -> Converted:
    done = run("xeco-convert", source, base / "out", *options, "--json", base / "report.json")
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

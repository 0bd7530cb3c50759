"""Commands let waiting threads sleep, before torch is loaded, and leave what the user set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import os, sys
import click
import {module}
from xeco_convert.commandline.run import run_command
assert "torch" not in sys.modules, "torch is loaded before the command could say how its threads wait"
run_command(click.Command("probe", callback=lambda: click.echo(os.environ["OMP_WAIT_POLICY"])), [], "probe")
"""


@pytest.mark.parametrize("module", ["xeco_convert.cli", "xeco_distill.cli"])
@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(module: str, given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    command = [sys.executable, "-c", PROBE.format(module=module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected

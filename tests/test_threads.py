"""Commands let waiting threads sleep and keep freed memory, before torch is loaded, and leave what the user set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import os, sys
import click
import {module}
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
from xeco_convert.commandline.run import run_command
assert "torch" not in sys.modules, "torch is loaded before the command could say how its threads wait"
run_command(click.Command("probe", callback=lambda: click.echo(" ".join(map(str, map(os.environ.get, NAMES))))), [], "probe")
"""


@pytest.mark.parametrize("module", ["xeco_convert.cli", "xeco_distill.cli"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "passive 2000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    module: str, given: dict[str, str], expected: str
) -> None:
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in own} | given
    command = [sys.executable, "-c", PROBE.format(module=module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


FAULTS = """
import ctypes, resource
import click
from xeco_convert.commandline.run import run_command
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def five_tensors():
    memories = [c.malloc(30 << 20) for _ in range(5)]
    for memory in memories:
        ctypes.memset(memory, 1, 30 << 20)
    for memory in memories:
        c.free(memory)
def probe():
    five_tensors()
    five_tensors()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        five_tensors()
    click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
run_command(click.Command("probe", callback=probe), [], "probe")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.parametrize(("given", "is_kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_freed_memory_is_used_again_unless_the_user_says_otherwise(given: dict[str, str], is_kept: bool) -> None:
    """Page by page from the system, three times 150 MiB are 115,200 faults."""
    taken = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(taken)} | given
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000 if is_kept else int(done.stdout) > 20_000

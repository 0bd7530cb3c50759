"""Python programs and commands in processes of their own, forked from one that has imported what takes them longest.

A program is what `python -c` makes of it, but that torch comes first: nothing of transformers, of the packages that it reads
and writes files with, or of this project is imported there. A command is the installed script, but that torch, transformers
and the other packages that it stands on come first; nothing of this project is imported there. No number has been computed in
either. What concerns the import of torch itself starts a process as users do, and so do the conversions that other tests look
at (end_to_end/conftest.py).
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOR_PROGRAMS = ("torch._dynamo", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes", "scipy.optimize")
_FOR_COMMANDS = (
    *_FOR_PROGRAMS,
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "transformers.trainer",
    "safetensors.torch",
    "datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "rich.console",
    "click",
)
# Read when their packages are imported, which here they are already.
_READ_ON_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "TORCH", "PYTHON", "LD_", "MPL", "CUDA")

_SERVER = """
import gc, importlib, json, os, signal, sys, types, warnings
warnings.simplefilter("ignore")
import torch
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
warnings.resetwarnings()
foreign = {"xeco_convert", "xeco_distill"} & set(sys.modules)
assert not foreign, foreign
gc.collect()
gc.freeze()  # collections of a program leave what is here alone, which then stays shared memory
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        pid, status = os.waitpid(job["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
else:
    sys.exit()
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    file = os.open(name, os.O_RDWR | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
signal.setitimer(signal.ITIMER_REAL, job["timeout"])  # its signal ends a program that does not end
sys.argv = job["argv"]
sys.modules["__main__"] = program = types.ModuleType("__main__")
exec(compile(job["code"], job["name"], "exec"), program.__dict__)
"""


class Program:
    """A running program, as `subprocess.Popen` has it: what it has printed so far is in the files `out` and `err`."""

    def __init__(self, server: _Server, job: dict[str, Any], folder: tempfile.TemporaryDirectory[str] | None) -> None:
        self.args = job["argv"]
        self.returncode: int | None = None
        self._server, self._job, self._folder = server, job, folder
        self.pid: int = server.ask(job)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Its exit code (negative: the signal that ended it). Raises `subprocess.TimeoutExpired`, also where the program's own
        time was up."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        if self.returncode is None or self.returncode == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(self.args, timeout, *self.printed())
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has printed, when it has ended."""
        self.wait(timeout)
        return self.printed()

    def printed(self) -> tuple[str, str]:
        """Standard output and error so far."""
        out, err = (Path(self._job[name]).read_text("utf-8", errors="replace") for name in ("out", "err"))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_fresh(
    code: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a program with sys.argv[1:] = arguments in its own process, in `folder`, with `environment` (whole) or this one's.

    Its exit code (negative: the signal that ended it) and what it has printed. Raises `subprocess.TimeoutExpired`.
    """
    environment = os.environ if environment is None else environment
    program = _started(_PROGRAMS, code, ["-c", *arguments], environment, folder, timeout)
    return _completed(program)


def run_command(
    name: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs an installed command; `environment` adds to this one's. In a new interpreter where that says what packages read
    when they are imported."""
    if any(variable.startswith(_READ_ON_IMPORT) for variable in environment or ()):
        return run_anew(name, *arguments, environment=environment, folder=folder, timeout=timeout)
    return _completed(start_command(name, *arguments, environment=environment, folder=folder, timeout=timeout))


def run_anew(
    name: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter, as users have it."""
    command, whole = [str(_script(name)), *map(str, arguments)], {**os.environ, **(environment or {})}
    return subprocess.run(command, env=whole, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout)


def start_command(
    name: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 300,
    log: Path | None = None,
) -> Program:
    """An installed command, started; `environment` adds to this one's, all output goes to `log` where there is one."""
    script = _script(name)
    whole = {**os.environ, **(environment or {})}
    argv = [str(script), *map(str, arguments)]
    return _started(_COMMANDS, script.read_text("utf-8"), argv, whole, folder, timeout, name=str(script), log=log)


def _script(name: str) -> Path:
    return Path(sys.executable).parent / name


def _completed(program: Program) -> subprocess.CompletedProcess[str]:
    out, err = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


def _started(
    server: _Server,
    code: str,
    argv: list[str],
    environment: Mapping[str, str],
    folder: Path | None,
    timeout: float,
    *,
    name: str = "<string>",
    log: Path | None = None,
) -> Program:
    files = tempfile.TemporaryDirectory(prefix="xeco_test_fresh_")
    out, err = (log, log) if log is not None else (Path(files.name) / "out", Path(files.name) / "err")
    for file in (out, err):
        file.touch()
    job = {
        "code": code,
        "name": name,
        "argv": argv,
        "environment": dict(environment),
        "folder": str(folder or Path.cwd()),
        "out": str(out),
        "err": str(err),
        "timeout": timeout,
    }
    return Program(server, job, files)


class _Server:
    """A process to fork from, with `modules` imported, started when first asked: once for each worker of pytest-xdist."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def ask(self, job: dict[str, Any]) -> Any:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process that programs are forked from has ended"
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, *self._modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            atexit.register(self._stop)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        return self._process

    def _stop(self) -> None:
        """Ends the server and whatever runs in its session."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()


_PROGRAMS, _COMMANDS = _Server(_FOR_PROGRAMS), _Server(_FOR_COMMANDS)

"""Python programs in processes of their own, forked from one that has imported torch: most of a short program's time.

Nothing of transformers, of the packages that it reads and writes files with, or of this project is imported there, and no
number has been computed: a program is what `python -c` makes of it, but that torch comes first. What concerns the import of
torch itself, the commands and signals starts a process as users do.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SERVER = """
import gc, json, os, signal, sys, types, warnings
warnings.simplefilter("ignore")
import torch, torch._dynamo, torch.distributed.tensor, torch.fx.experimental.symbolic_shapes
try:
    import scipy.optimize
except ImportError:
    pass
warnings.resetwarnings()
foreign = {"transformers", "safetensors", "huggingface_hub", "tokenizers", "xeco_convert", "xeco_distill"} & set(sys.modules)
assert not foreign, foreign
gc.collect()
gc.freeze()  # collections of a program leave what is here alone, which then stays shared memory
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    file = os.open(name, os.O_RDWR)
    os.dup2(file, number)
    os.close(file)
signal.setitimer(signal.ITIMER_REAL, job["timeout"])  # its signal ends a program that does not end
sys.argv = ["-c", *job["arguments"]]
sys.modules["__main__"] = program = types.ModuleType("__main__")
exec(compile(job["code"], "<string>", "exec"), program.__dict__)
"""
_server: subprocess.Popen[str] | None = None


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
    with tempfile.TemporaryDirectory(prefix="xeco_test_fresh_") as name:
        out, err = Path(name) / "out", Path(name) / "err"
        for file in (out, err):
            file.touch()
        job = {
            "code": code,
            "arguments": arguments,
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
            "out": str(out),
            "err": str(err),
            "timeout": timeout,
        }
        status = _ask(json.dumps(job))
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(code, timeout, out.read_text("utf-8"), err.read_text("utf-8"))
        return subprocess.CompletedProcess(["-c", *arguments], status, out.read_text("utf-8"), err.read_text("utf-8"))


def _ask(job: str) -> int:
    server = _running()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(job + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that programs are forked from has ended"
    return int(answer)


def _running() -> subprocess.Popen[str]:
    """The server, started where there is none yet: once for each worker of pytest-xdist."""
    global _server  # noqa: PLW0603
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(_stop)
        assert _server.stdout is not None
        assert _server.stdout.readline() == "ready\n"
    return _server


def _stop() -> None:
    """Ends the server and whatever runs in its session."""
    if _server is not None:
        try:
            os.killpg(_server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _server.wait()

"""Programs that are forked from a process with torch are what `python -c` would make of them, one not knowing of the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh


def test_a_program_begins_with_torch_and_nothing_that_it_may_test() -> None:
    code = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    packages = set(run_fresh(code).stdout.split())
    assert "torch" in packages
    assert not packages & {
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "xeco_convert",
        "xeco_distill",
    }


def test_arguments_environment_folder_and_path_are_those_of_a_new_interpreter(tmp_path: Path) -> None:
    code = "import os, sys\nprint(sys.argv, os.getcwd(), os.environ.get('XECO_OF_A_TEST'), len(os.environ), sys.path)"
    environment = {**os.environ, "XECO_OF_A_TEST": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", code, "a", "b c"]
    real = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = run_fresh(code, "a", "b c", environment=environment, folder=tmp_path)
    assert found.returncode == 0 and found.stdout == real.stdout != ""


def test_programs_do_not_know_of_each_other() -> None:
    name = "XECO_OF_A_TEST"
    run_fresh(f"import os, builtins, json.tool; builtins.of_another = 1; os.environ[{name!r}] = '2'")
    code = f"import os, sys, builtins; print('json.tool' in sys.modules, hasattr(builtins, 'of_another'), {name!r} in os.environ)"
    assert run_fresh(code).stdout == "False False False\n"


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a sentence')", 1, "a sentence"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import atexit, sys; atexit.register(lambda: print('at the end', file=sys.stderr))", 0, "at the end"),
        ("x = = 1", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_ends_are_those_of_an_interpreter(code: str, status: int, last: str) -> None:
    done = run_fresh(code)
    assert done.returncode == status
    assert (done.stderr.splitlines() or [""])[-1] == last


def test_a_program_without_end_is_stopped_and_the_next_one_runs() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_fresh("import threading; threading.Event().wait()", timeout=0.2)
    assert run_fresh("print(1)").stdout == "1\n"

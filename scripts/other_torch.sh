#!/usr/bin/env bash
# other_torch.sh WHEEL REQUIREMENT [PIP OPTIONS]: one built binary under another torch. Run by hand, and by the workflow.
#   scripts/other_torch.sh dist/wheel/*.whl torch==2.10.0 --index-url https://download.pytorch.org/whl/cpu
# Makes a fresh environment with REQUIREMENT, installs WHEEL beside it, and runs tests/ops from outside the source tree, so
# that the binary in the wheel is what is tested. Environment:
#   STUB_CUDA=1   REQUIREMENT is a CUDA build; install it without CUDA's libraries, on empty ones (scripts/stub_cuda.py)
#   KEEP=FOLDER   make the environment in FOLDER, which stays, instead of a temporary one
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
requirement=$2
shift 2
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT XECO_EXTENSION XECO_CPU_LEVEL

say() { printf '\n== %s\n' "$*"; }

if [ -n "${KEEP:-}" ]; then
  mkdir -p "$KEEP"
  folder=$(realpath "$KEEP")
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
cd "$folder"

say "an environment with $requirement, in $folder"
"${PYTHON:-python3}" -m venv env
python=$folder/env/bin/python
transformers=$(grep '^transformers==' "$repository/constraints.txt")
if [ "${STUB_CUDA:-0}" = 1 ]; then
  "$python" -m pip install --quiet --no-deps "$@" "$requirement"
  # what torch needs beside CUDA
  "$python" -m pip install --quiet filelock typing_extensions networkx jinja2 fsspec sympy setuptools
  rm -rf stubs
  "$python" "$repository/scripts/stub_cuda.py" stubs
  export LD_LIBRARY_PATH=$folder/stubs
else
  "$python" -m pip install --quiet "$@" "$requirement"
fi
# torch is there; nothing of what follows may bring another
"$python" -m pip install --quiet "$transformers" safetensors huggingface_hub numpy click rich pytest
"$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"

say "tests/ops on the wheel's binary"
rm -rf tests
cp -r "$repository/tests" "$repository/pyproject.toml" .
export OMP_NUM_THREADS=1
"$python" -I - "$requirement" <<'PYTHON'
import sys

import torch

from xeco_convert.ops.extension import extension

module = extension()
print(f"torch {torch.__version__} ({sys.argv[1]} asked for), {module.__file__}, built with {module.built_with_torch}")
assert module.__file__.startswith(sys.prefix), module.__file__
PYTHON
"$python" -m pytest -p no:cacheprovider -q tests/ops

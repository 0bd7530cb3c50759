#!/usr/bin/env bash
# check_wheel.sh WHEEL: what a stranger has after `pip install WHEEL`. A fresh environment, torch as constraints.txt says, no
# compiler to be found, a folder outside the source tree; then scripts/check_installed.py: the demo and the compiled kernels.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
python=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }

folder=$(mktemp -d)
trap '/bin/rm -rf "$folder"' EXIT
cd "$folder"

say "a fresh environment, in $folder"
"$python" -m venv env
# from here on nothing but this environment's own commands
bin=$folder/env/bin
mkdir home
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV XECO_EXTENSION XECO_ATTENTION XECO_CPU_LEVEL CXX CC
export PATH=$bin HOME=$folder/home OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_CONSTRAINT=$repository/constraints.txt
for compiler in c++ cc g++ gcc clang++ clang ninja; do
  if command -v "$compiler"; then
    echo "there should be no $compiler on PATH"
    exit 1
  fi
done
pip install --quiet --only-binary :all: "$wheel"

say "the package, as installed"
python -I "$repository/scripts/check_installed.py"

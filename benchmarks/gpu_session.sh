#!/usr/bin/env bash
# Builds, tests and benchmarks the GPU kernels on a bare machine with torch >= 2.10, nvcc and a GPU, in under 9 minutes.
# Nothing is installed or fetched: the packages that tests and benchmarks import (pytest, transformers, ...) must be there.
#
# Usage: benchmarks/gpu_session.sh [FOLDER]     results go to FOLDER (default: $OUT, or benchmarks/results)
# Exit code 0: built, every test passed, every bound met. 2: torch sees no GPU, or a tool is missing. Otherwise 1; each part is
# written, and the next one tried, whatever the result.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
folder=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
seconds_in_all=525
mkdir -p "$folder"
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
failed=0

part() { # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS left=$((seconds_in_all - SECONDS)) code
  shift 2
  timeout --kill-after=5 "$((limit < left ? limit : left > 1 ? left : 1))" "$@" > "$folder/gpu_$name.log" 2>&1
  code=$?
  echo "$name: exit code $code after $((SECONDS - start)) s, output in $folder/gpu_$name.log"
  tail -n 25 "$folder/gpu_$name.log"
  [ $code = 0 ] || failed=1
  return $code
}

"$python" - << 'PYTHON' || exit 2
import importlib.util, sys
for name in ("torch", "pytest", "transformers", "safetensors", "filelock", "setuptools", "ninja"):
    if importlib.util.find_spec(name) is None:
        sys.exit(f"gpu_session: {sys.executable} has no package {name}")
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_session: torch sees no GPU: nothing is built, tested or measured")
print(torch.cuda.get_device_name(0), "capability", torch.cuda.get_device_capability(0), "torch", torch.__version__)
PYTHON
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability(0)))')
  export TORCH_CUDA_ARCH_LIST
fi
# the tests of the ops compute on the CPU what they compare with: one process for every second core, where xdist is there
several=()
if "$python" -c 'import xdist' 2> /dev/null; then several=(-n "$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))"); fi

XECO_BUILD_EXT=1 XECO_BUILD_DEVICE=1 part build 170 "$python" setup.py --quiet build_ext --inplace || exit 1
part test 150 "$python" -m pytest tests/device tests/ops -m gpu -q --maxfail=20 -p no:cacheprovider "${several[@]}"
part bench 130 "$python" benchmarks/bench_gpu_attention.py --json "$folder/gpu_attention.json"
part generate 75 "$python" benchmarks/gpu_generate.py --json "$folder/gpu_generate.json"
part choice 70 "$python" benchmarks/bench_gpu_choice.py --json "$folder/gpu_choice.json"
exit $failed

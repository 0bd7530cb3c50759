#!/usr/bin/env bash
# Compile all device code for every target, on any machine, GPU or none: scripts/check_device.py, with what it needs.
#
# nvcc: from PATH, or from PyPI. cuobjdump, nvdisasm: from PyPI. clang 19 for AMD: from PATH, or by apt where this is root.
# Usage: scripts/check_device.sh PYTHON [arguments of check_device.py]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
shift || true

packages=(nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
if ! command -v nvcc > /dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  packages+=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
fi
"$python" -m pip install --quiet "${packages[@]}"
if ! command -v clang++-19 > /dev/null; then
  if [ "$(id -u)" != 0 ]; then
    echo "check-device: clang++-19 is missing; install it: apt-get install --no-install-recommends clang-19 lld-19 llvm-19" >&2
    exit 1
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends clang-19 lld-19 llvm-19 > /dev/null
fi
exec "$python" scripts/check_device.py "$@"

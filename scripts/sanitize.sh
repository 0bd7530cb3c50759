#!/usr/bin/env bash
# Runs the tests of the compiled kernels on a build with AddressSanitizer and UndefinedBehaviorSanitizer; any finding ends it.
# The tile registers of AMX are memory in this build (XECO_EMULATE_AMX), so all levels are tested on any machine with
# AVX512_BF16, and the sanitizers see the tiles' loads and stores, which they would not see in AMX instructions.
#   make sanitize                  makes the environment and calls this
#   scripts/sanitize.sh [ARGUMENTS OF PYTEST]
# Needs GCC with its sanitizers' libraries (Debian: g++ brings them).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
build=build-sanitize
PATH="$(cd "$(dirname "$python")" && pwd):$PATH" # ninja
tests=(tests/ops/test_latent_attention.py tests/ops/test_latent_attention_decode.py tests/ops/test_latent_attention_packed.py
  tests/ops/test_mask_ranges.py tests/ops/test_pack_rows.py tests/ops/test_rope_and_append.py tests/ops/test_bad_input.py)

say() { printf '\n== %s\n' "$*"; }

say "the extension with sanitizers, in $build"
mkdir -p "$build"
log=$build/build.log
# -O1: GCC's vector code with checks on every access is slow to compile and to run at -O3; -g1: lines in reports
CC=gcc CXX=g++ XECO_BUILD_EXT=1 XECO_EMULATE_AMX=1 \
  XECO_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1" \
  XECO_LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py --quiet build_ext --build-lib "$build" --build-temp "$build/temp" > "$log" 2>&1 || { cat "$log"; exit 1; }
module=$(find "$PWD/$build/xeco_convert" -name '_C.*.so')
nm -D "$module" | grep __asan_report > /dev/null || { echo "$module: expected calls of the sanitizers, found none"; exit 1; }

say "tests of the kernels under the sanitizers"
# Both libraries must be there before Python, and libstdc++ before both look for __cxa_throw. Python and torch leave memory
# to the end of the process, which is no leak of ours.
run() {
  env LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    XECO_EXTENSION="$module" OMP_NUM_THREADS=1 XECO_TEST_EVERY_LEVEL=1 "$@"
}
run "$python" -c '
import os
from xeco_convert.ops.extension import extension
module = extension()
assert module.__file__ == os.environ["XECO_EXTENSION"], module.__file__
print("levels:", ", ".join(module.compiled_levels), "up to", module.detected_level, "; emulated:", module.emulated)'
run "$python" -m pytest -p no:cacheprovider -q -n 2 "${@:-${tests[@]}}"

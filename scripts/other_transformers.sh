#!/usr/bin/env bash
# other_transformers.sh [oldest|newest|VERSION] [--all]: the tests under another release of transformers than constraints.txt pins.
#   scripts/other_transformers.sh              the oldest that pyproject.toml allows, and the newest that the index has
#   scripts/other_transformers.sh 5.18.0       one release
#   scripts/other_transformers.sh oldest --all the whole suite instead of modelling, saving, generation, caches and healing
# Takes torch and everything else from the environment that `make test` made ($VENV, .venv by default); transformers, and what
# that release wants otherwise than it is there, go into an environment of their own in build/, which is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${VENV:-.venv}")
tests=(tests/modeling tests/families tests/distill tests/demo tests/test_conversion.py tests/test_everyday_tools.py)
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1
pinned=$(sed -n 's/^transformers==//p' constraints.txt)

fail() { printf 'other_transformers.sh: %s\n' "$*" >&2; exit 1; }
say() { printf '\n== %s\n' "$*"; }

[ -x "$venv/bin/pytest" ] || fail "$venv has no pytest; run \`make test\` first, or set VENV to an environment that has the tests' packages"

oldest() { sed -n 's/^  "transformers>=\([0-9.]*\)",$/\1/p' pyproject.toml; }

newest() {
  local versions
  versions=$("$venv/bin/python" -m pip index versions transformers 2> /dev/null) || fail "the package index does not answer"
  sed -n 's/^Available versions: \([^,]*\).*/\1/p' <<< "$versions"
}

packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# an environment with this release: its own packages come before those of $venv, whose .pth files are read too
environment() {
  local folder=$1 version=$2 command
  [ ! -e "$folder/.installed" ] || return 0
  rm -rf "$folder"
  "$venv/bin/python" -m venv --without-pip "$folder"
  printf 'import site; site.addsitedir("%s")\n' "$(packages_of "$venv")" > "$(packages_of "$folder")/zz_project.pth"
  grep -v '^transformers==' constraints.txt > "$folder/constraints.txt"
  PIP_CONSTRAINT=$folder/constraints.txt "$folder/bin/python" -m pip install --quiet "transformers==$version"
  for command in "$venv"/bin/xeco-*; do # which the end-to-end tests look for beside the interpreter
    sed "1s|.*|#!$folder/bin/python|" "$command" > "$folder/bin/${command##*/}"
    chmod +x "$folder/bin/${command##*/}"
  done
  touch "$folder/.installed"
}

run() {
  local version=$1 folder=$PWD/build/transformers-$1
  say "transformers $version, in $folder"
  environment "$folder" "$version"
  "$folder/bin/python" - "$version" << 'PYTHON'
import sys

import torch
import transformers

print(f"transformers {transformers.__version__} ({transformers.__path__[0]}), torch {torch.__version__}")
wanted = sys.argv[1].split(".")
if transformers.__version__.split(".")[: len(wanted)] != wanted:
    sys.exit(f"expected transformers {sys.argv[1]}, found {transformers.__version__}")
PYTHON
  if [ "$all" = 1 ]; then
    "$folder/bin/python" -m pytest -p no:cacheprovider -n 2 --dist loadgroup -rs
  else
    "$folder/bin/python" -m pytest -p no:cacheprovider -n 2 --dist loadgroup -q "${tests[@]}"
  fi
}

all=0
which=()
for argument in "$@"; do
  case $argument in
    --all) all=1 ;;
    oldest | newest | [0-9]*) which+=("$argument") ;;
    *) fail "expected oldest, newest, a version or --all, found $argument" ;;
  esac
done
for wanted in "${which[@]:-oldest newest}"; do
  for one in $wanted; do
    case $one in
      oldest) run "$(oldest)" ;;
      newest)
        version=$(newest)
        [ -n "$version" ] || fail "the package index names no release of transformers"
        if [ "$version" = "$pinned" ]; then
          say "the newest release of transformers is $version, which constraints.txt pins: \`make test\` runs all tests under it"
        else
          run "$version"
        fi
        ;;
      *) run "$one" ;;
    esac
  done
done

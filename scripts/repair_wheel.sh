#!/usr/bin/env bash
# repair_wheel.sh WHEEL FOLDER: tags WHEEL manylinux_2_28 or lower, strips it, puts it into FOLDER. torch's own libraries stay
# out: the wheel uses those of the torch that it finds. Also cibuildwheel's repair command (pyproject.toml).
set -euo pipefail
wheel=$1
folder=$2

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
python3 -m zipfile -e "$wheel" "$unpacked"
module=$(find "$unpacked" -name '_C.*.so')
if [ -z "$module" ]; then
  echo "$wheel: expected xeco_convert/_C.*.so in it, found none; was there a compiler?" >&2
  exit 1
fi

# the remedy for a symbol listed here is in csrc/compat/
newest=$(objdump -T "$module" | grep -oE 'GLIBC_[0-9.]+' | sort -V | tail -1)
if [ "$(printf '%s\nGLIBC_2.28\n' "$newest" | sort -V | tail -1)" != GLIBC_2.28 ]; then
  echo "$wheel: expected no symbol newer than GLIBC_2.28, found:" >&2
  objdump -T "$module" | awk '{ for (i = 1; i < NF; ++i) if (match($i, /GLIBC_2\.[0-9]+/)) {
    split(substr($i, RSTART + 6, RLENGTH - 6), v, "."); if (v[2] > 28) print "  " $NF, $i } }' >&2
  exit 1
fi

machine=$(uname -m)
auditwheel repair --strip --plat "manylinux_2_28_$machine" --wheel-dir "$folder" \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' --exclude 'libamdhip64.so.*' "$wheel"
auditwheel show "$folder"/*.whl

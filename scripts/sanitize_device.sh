#!/usr/bin/env bash
# Runs the GPU tests under NVIDIA's compute-sanitizer: memory accesses out of bounds, then races in shared memory. Needs a GPU.
#
# Usage: scripts/sanitize_device.sh [PYTEST ARGUMENTS]
# By default small shapes of every tile: a checked kernel is tens of times slower.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
# torch's allocator hands out pieces of large blocks, inside which nothing is out of bounds: without it every tensor is its own.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
if [ $# = 0 ]; then
  set -- -k "errors_are_at_most or paged or groups or splits or rotated"
fi
for tool in memcheck racecheck synccheck; do
  echo "compute-sanitizer $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 9 --launch-timeout 0 \
    "$python" -m pytest tests/device -m gpu -q -x -p no:cacheprovider "$@"
done

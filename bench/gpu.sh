#!/usr/bin/env bash
# On a machine with a CUDA GPU, from the repository's root: install without a registry, prove the kernels, time the
# operation and the training step, and leave rows and logs in $OUT (bench/results by default). Under 9 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
{
  python3 -m pip install -q --no-index --no-deps --no-build-isolation -e . &&
  python3 -m forde_fast info
} 2>&1 | tee "$out/install.log" || exit 1
failed=0
timeout 180 python3 -m pytest -x -k triton tests/test_repulsion.py tests/test_kernels.py 2>&1 | tee "$out/gpu_tests.log" || failed=1
timeout 60 python3 -m forde_fast verify 2>&1 | tee "$out/verify.log" || failed=1
timeout 150 python3 bench/repulsion.py --device cuda --out "$out" 2>&1 | tee "$out/repulsion.log" || failed=1
timeout 120 python3 bench/step.py --device cuda --out "$out" 2>&1 | tee "$out/step.log" || failed=1
exit $failed

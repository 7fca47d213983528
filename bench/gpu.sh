#!/usr/bin/env bash
# On a machine with a CUDA GPU: install without a registry, prove the kernels, time the operation and the training step
# against their floors and baselines. Rows, logs and figures go to $OUT (bench/results by default). Under 9 minutes:
# every part has its own limit, and one that fails takes nothing from the others. DEVICE=cpu goes through all of it at
# small sizes without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-bench/results}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
failed=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: $((SECONDS - start)) s, status $status"
  [ "$status" -eq 0 ] || failed+=("$name")
}

if [ "$device" = cuda ]; then
  install=(-m pip install --no-index --no-deps --no-build-isolation --log "$out/build.log" -e .)
  tests=()
  cifar=(--shapes cifar --rounds 50)
  others=(--shapes "weights,tinyimagenet,imagenet,50x128x3072,128x128x3072" --providers reference,triton,cuda --rounds 30)
  step=(--rounds 9)
else
  install=(setup.py -q build_ext --inplace)
  tests=(--collect-only)
  cifar=(--shapes 3x4x64 --rounds 2)
  others=(--shapes digits --lengthscales identity --providers reference,cpp --rounds 2)
  step=(--rounds 1 --cases cnn-digits --providers plain-de,de,plain-forde,forde)
fi
part install 120 "$python" "${install[@]}"
part info 20 "$python" -m forde_fast info
part verify 60 "$python" -m forde_fast verify
part tests 120 "$python" -m pytest -q "${tests[@]}" -k "(kernels or triton or cuda or second_order or graph or precision) and not (aot or build)" tests
part operation 80 "$python" bench/repulsion.py --device "$device" --out "$out" "${cifar[@]}"
part operation_sizes 70 "$python" bench/repulsion.py --device "$device" --out "$out" "${others[@]}"
part step 55 "$python" bench/step.py --device "$device" --out "$out" "${step[@]}"
part report 15 "$python" bench/report.py --results "$out" --print
echo "failed parts: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]

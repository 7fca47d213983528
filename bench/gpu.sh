#!/usr/bin/env bash
# On a machine with a CUDA GPU: install without a registry, prove the kernels, time the operation and the training step
# against their floors and baselines. Rows, logs and figures go to $OUT (bench/results by default). Under 9 minutes:
# every part has its own limit, and one that fails takes nothing from the others. Names choose among the parts:
#     bench/gpu.sh [install tests operation operation_sizes step official report], or verify, which takes minutes
# DEVICE=cpu goes through all of it at small sizes without a GPU. FORDE_CHECKOUT, a folder with the published code, adds
# the comparison with its JAX step.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-bench/results}")
parts=" ${*:-install tests operation operation_sizes step official report} "
mkdir -p "$out"
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} XLA_PYTHON_CLIENT_PREALLOCATE=false
failures=$(mktemp)
trap 'rm -f "$failures"' EXIT

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ $parts == *" $name "* ]] || return 0
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  tail -n 25 "$out/$name.log"
  echo "== $name: $((SECONDS - start)) s, status $status"
  [ "$status" -eq 0 ] || echo "$name" >> "$failures"
}

if [ "$device" = cuda ]; then
  export TRITON_INTERPRET=0
  install=(-m pip install --no-index --no-deps --no-build-isolation -e .)
  tests=(-k "(kernels or triton or cuda or second_order or graph or precision) and not (aot or build or spills)")
  "$python" -c "import xdist" 2> /dev/null && tests+=(-n "$(nproc)")
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
part install 110 "$python" "${install[@]}"
"$python" -m forde_fast info
part verify 480 env OMP_NUM_THREADS=1 "$python" -m forde_fast verify # its tensors are small
part tests 150 "$python" -m pytest -q "${tests[@]}" tests
part operation 90 "$python" bench/repulsion.py --device "$device" --out "$out" "${cifar[@]}"
part operation_sizes 65 "$python" bench/repulsion.py --device "$device" --out "$out" "${others[@]}"
part step 105 "$python" bench/step.py --device "$device" --out "$out" "${step[@]}"
if [ -n "${FORDE_CHECKOUT:-}" ]; then
  part official 80 "$python" bench/official_jax.py --checkout "$FORDE_CHECKOUT" --members 10 --batch 128 --out "$out"
fi
part report 15 "$python" bench/report.py --results "$out" --print
echo "failed parts: $(paste -sd' ' "$failures" | sed 's/^$/none/')"
[ ! -s "$failures" ]

#!/usr/bin/env bash
# Every number of a GPU from one command: bench/gpu.sh [OUTPUT_FOLDER [STEP...]]
#
# Steps: build, doctor, tests, memory, ops, e2e, rollout, passes, growth; all of them unless some are
# named. A step that reaches its limit is ended, and the next one begins. The limits of all are 31
# minutes together; `bench/gpu.sh OUT tests e2e rollout` takes twelve at most, and `OUT passes growth`.
#
# For a machine with an NVIDIA GPU and a Python that has torch, triton and transformers; no network.
# What cannot be had there (a compiler, pytest, other packages) is left out, and log.txt says so.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results/gpu}}
shift
wanted=" ${*:-build doctor tests memory ops e2e rollout passes growth} "
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec > >(tee "$out/log.txt") 2>&1

step() {  # step NAME SECONDS COMMAND...: if it is wanted; goes on after a failure, and says so
  local name=$1 seconds=$2 started=$SECONDS
  shift 2
  [[ $wanted == *" ${name%%-*} "* ]] || return 0
  echo "== $name"
  timeout "$seconds" "$@" || echo "== $name FAILED with exit status $?"
  echo "== $name took $((SECONDS - started)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
$python -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "no CUDA device")' || exit 1
step build 90 "$python" setup.py build_ext --inplace
step doctor 30 "$python" -m ppo_engine doctor
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")  # most of it is compiling
step tests 150 "$python" -m pytest -q $workers -m gpu tests/test_gpu.py
for tool in memcheck racecheck initcheck; do
  step "memory-$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tests/gpu_memory.py
done
# Must fail: a fault is planted. Of the many reports, how many there are.
step memory-planted 40 bash -c \
  'compute-sanitizer --error-exitcode 9 "$0" tests/gpu_memory.py plant 2>&1 | tail -n 1; exit "${PIPESTATUS[0]}"' "$python"
step ops 300 "$python" bench/run.py --device cuda --seconds 0.1 --out "$out/ops.csv" --plot
step e2e 170 "$python" bench/e2e.py --device cuda --model qwen2.5-1.5b --out "$out/e2e.csv"
step e2e-8bit 60 "$python" bench/e2e.py --device cuda --model qwen2.5-1.5b --only ours --repeats 1 \
  --moments 8bit --out "$out/e2e-8bit.csv"
# TRL_PYTHON: of an environment with the TRL that bench/e2e_grpo.py names; without, ours alone.
step e2e-grpo 120 "$python" bench/e2e_grpo.py --device cuda --model qwen2.5-1.5b \
  --trl "${TRL_PYTHON:-$python}" --out "$out/e2e-grpo.csv"
step e2e-offload 60 "$python" bench/e2e.py --device cuda --model qwen2.5-1.5b --only ours --repeats 1 \
  --offload --out "$out/e2e-offload.csv"
step rollout 150 "$python" bench/rollout.py --device cuda --repeats 2 --out "$out/rollout.csv"
step passes 110 "$python" bench/passes.py --device cuda --model qwen2.5-1.5b --seconds 5 --out "$out/passes.csv"
# Fewer tokens: plain's activations beside 7B weights and gradients are to fit into 80 GB.
step passes-7b 110 "$python" bench/passes.py --device cuda --model qwen2.5-7b --tokens 4096 --seconds 5 --out "$out/passes-7b.csv"
step growth 300 "$python" bench/growth.py --device cuda --out "$out/growth.csv" --plot
echo "Everything is in $out"

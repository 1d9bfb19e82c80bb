#!/usr/bin/env bash
# Measures specjax on the accelerator of this machine, in at most eight minutes: `make accelerator`.
#
# Usage: launch/accelerator.sh [OUT]          OUT is runs/accelerator unless it is given
#
# Environment:
#   PYTHON   the interpreter; .venv/bin/python, or python3 if there is none
#   WHEELS   a folder of wheels to install first, for a machine that cannot download packages
#   SMOKE=1  runs tiny shapes, on CPU too
#   PARTS    the parts to run; all of them unless it is given
#   SCALE    a number that all time limits are multiplied with, for a slower machine; 1 unless it is given
#
# Each part is a process with a time limit of its own, and writes its record at once: what has run stays if a later part
# fails or the machine is taken away. OUT/PART.json is the record, OUT/PART.log what the part printed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=$(realpath -m "${1:-runs/accelerator}")
mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
variant=${SMOKE:+:smoke}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/programs}

# part SECONDS NAME COMMAND..: runs a command with a time limit, prints how it ended.
failed=0
part() {
  local limit=$(($1 * ${SCALE:-1})) name=$2
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  local began=$SECONDS code=0
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  case $code in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped after its $limit s" ;;
    *) echo "$name: failed with status $code, see $out/$name.log" ;;
  esac
  [[ $code == 0 ]] || failed=1
}

# table SECONDS NAME: a table of configs/benchmark/accelerator.py.
table() {
  part "$1" "$2" "$python" -m specjax.main --config="configs/benchmark/accelerator.py$variant" \
    --workdir="$out/$2" --config.tables="('$2',)"
  [[ ! -f $out/$2/results.json ]] || cp "$out/$2/results.json" "$out/$2.json"
}

# A GPU compiles a tiny program for seconds, so a few tests: the rules, and the distribution of one drafter's text.
chosen="test_rules or (test_the_loop_samples_the_targets_distribution and model)"
[[ -z ${SMOKE:-} ]] || chosen=test_rules
# In float32, whose products a GPU would otherwise round to 10 bits.
part 70 exactness env SPECJAX_SPREAD_TESTS=1 JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
  "$python" -m pytest -q -p no:benchmark -n 4 --junitxml="$out/exactness.xml" -m "not slow and not peers" \
  -k "$chosen" tests/test_rules.py tests/test_exactness.py
table 15 bandwidth
table 100 large_plain
table 90 large_speculative
table 60 greedy_identity
table 45 on_policy_step
table 60 profile
table 45 transformers_decoding
table 30 transformers_step
exit "$failed"

#!/usr/bin/env bash
# Measures specjax on the accelerator of this machine, in at most eight minutes: `make accelerator`.
#
# Usage: launch/accelerator.sh [OUT]          OUT is runs/accelerator unless it is given
#
# Environment:
#   PYTHON   the interpreter; .venv/bin/python, or python3 if there is none
#   WHEELS   a folder of wheels to install first, for a machine that cannot download packages
#   SMOKE=1  runs tiny shapes, on CPU too
#   PARTS    the parts to run; all of them unless it is given (`first` is the first run of the tables)
#   SCALE    a number that all time limits are multiplied with, for a slower machine; 1 unless it is given
#   SECONDS_IN_ALL   the limit of all parts together; 470 unless it is given
#
# Each part is a process with a time limit of its own, and writes its record at once: what has run stays if a later part
# fails or the machine is taken away. OUT/PART.json is the record, OUT/PART.log what the part printed. A GPU compiles each
# program for seconds, so on one all tables run once side by side first, which leaves their programs in the cache.
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
if [[ -z ${SMOKE:-} ]] && ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")'; then
  echo "error: JAX finds no GPU or TPU: install its build for this machine, such as jax[cuda12], or set SMOKE=1" >&2
  exit 2
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/programs}

# part SECONDS NAME COMMAND..: runs a command with a time limit, prints how it ended.
failed=0 budget=$((${SECONDS_IN_ALL:-470} * ${SCALE:-1}))
part() {
  local limit=$(($1 * ${SCALE:-1})) name=$2 left=$((budget - SECONDS))
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  ((left > 10)) || { echo "$name: left out, the $budget s of all parts are over"; failed=1; return 0; }
  ((limit < left)) || limit=$left
  local began=$SECONDS code=0
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  case $code in
    0) echo "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) echo "$name: stopped after its $limit s" ;;
    *) echo "$name: failed with status $code, see $out/$name.log" ;;
  esac
  [[ $code == 0 ]] || failed=1
}

# table SECONDS NAME [PREFIX..]: a table of configs/benchmark/accelerator.py.
table() {
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$@" "$python" -m specjax.main --config="configs/benchmark/accelerator.py$variant" \
    --workdir="$out/$name" --config.tables="('$name',)"
  [[ ! -f $out/$name/results.json ]] || cp "$out/$name/results.json" "$out/$name.json"
}

# first NAME [PREFIX..]: runs a table in the background, shortened and not recorded, so that its programs are compiled.
first() {
  local name=$1
  shift
  timeout --kill-after=10 $((200 * ${SCALE:-1})) "$@" "$python" -m specjax.main \
    --config="configs/benchmark/accelerator.py$variant" --workdir="$out/first/$name" --config.tables="('$name',)" \
    --config.repeats=1 >"$out/first-$name.log" 2>&1 &
}

# Float32 products are exact with this; a GPU would otherwise round their inputs to 10 bits. What is not timed takes the
# first algorithm for each product, because to time all of them is most of what compiling costs there.
exact=(JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_gpu_autotune_level=0)
shared=XLA_PYTHON_CLIENT_PREALLOCATE=false
# A TPU serves one process at a time.
if [[ -z ${PARTS:-} || " $PARTS " == *" first "* ]] && nvidia-smi -L >/dev/null 2>&1; then
  for name in large_plain large_speculative on_policy_step profile; do
    first "$name" env "$shared"
  done
  first greedy_identity env "$shared" "${exact[@]}"
fi
# A few tests, because a GPU compiles a tiny program for seconds: the rules, and the distribution of one drafter's text.
chosen="test_rules or at_temperature_1 or (test_the_loop_samples_the_targets_distribution and model)"
[[ -z ${SMOKE:-} ]] || chosen=test_rules
part 120 exactness env SPECJAX_SPREAD_TESTS=1 "${exact[@]}" "$shared" \
  "$python" -m pytest -q -p no:benchmark -n 4 --junitxml="$out/exactness.xml" -m "not slow and not peers" \
  -k "$chosen" tests/test_rules.py tests/test_exactness.py
wait
table 15 bandwidth
table 110 large_plain
table 120 large_speculative
table 90 transformers_decoding
table 80 on_policy_step
table 60 transformers_step
table 60 greedy_identity env "${exact[@]}"
table 60 profile
exit "$failed"

#!/usr/bin/env bash
# Runs a config in several processes on this machine's CPU, which connect like the hosts of a pod: to try a mesh, and
# for the tests. Left running, it costs nothing but this machine's time.
#
#   launch/local_processes.sh --processes=N --config=FILE --workdir=DIR [--devices=K] [--python=PYTHON] [--dry_run] \
#       [-- --config.section.key=value ...]
#
#   --devices  devices per process (default: 1); the mesh has N * K of them in all
#   --port     port of the coordinator, process 0 (default: a free one)
#   --python   the interpreter (default: .venv/bin/python, else python3)
#   --dry_run  print the commands without running them
#
# SIGTERM and SIGINT are passed to all processes. If one fails, the others are ended too, since they would wait for it.
# The exit code is that of the first process that failed: 75 if the run was stopped; the same command then resumes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

processes="" devices=1 port="" config="" workdir="" python=""
take_arguments "processes devices port python config workdir" "" "$@"
need processes config workdir
for number in processes devices; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number is ${!number}; it must be a whole number above 0"
done
if [[ -z $python ]]; then
  python=python3
  [[ ! -x .venv/bin/python ]] || python=.venv/bin/python
fi

# Searches below the range from which the system assigns ports.
free_port() {
  local candidate
  for candidate in $(shuf -i 20000-29999 -n 50); do
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "all 50 ports tried are in use; give a free one as --port=N"
}
[[ -n $port ]] || port=$(free_port)

pids=()
stop_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

flags=${XLA_FLAGS:-}
for ((id = 0; id < processes; id++)); do
  command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${flags:+$flags }--xla_force_host_platform_device_count=$devices"
    "$python" -m specjax.main --config="$config" --workdir="$workdir"
    --coordinator="127.0.0.1:$port" --processes="$processes" --process_id="$id" ${overrides[@]+"${overrides[@]}"})
  show "${command[@]}"
  if ! $dry_run; then
    "${command[@]}" &
    pids+=("$!")
    echo "process $id is $!" >&2
  fi
done
$dry_run && exit 0

trap 'stop_all TERM' TERM INT
code=0
running=${#pids[@]}
while ((running)); do
  ended=0
  wait -n "${pids[@]}" 2>/dev/null || ended=$?
  # A signal to this script ends `wait` as well: count only the processes that have ended.
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then alive+=("$pid"); fi
  done
  gone=$((running - ${#alive[@]}))
  running=${#alive[@]}
  pids=(${alive[@]+"${alive[@]}"})
  if ((gone && ended && code == 0)); then
    code=$ended
    # Processes that fail the same way, or save after SIGTERM, end by themselves; any others would wait forever.
    (sleep "${SPECJAX_GRACE_SECONDS:-20}"; stop_all KILL) >/dev/null 2>&1 &
    watcher=$!
  fi
done
[[ -z ${watcher:-} ]] || kill "$watcher" 2>/dev/null || true
exit "$code"

#!/usr/bin/env bash
# Runs a config in several processes on this machine's CPU, which join as the hosts of a pod would: for trying out a
# mesh, and for the tests. It costs nothing to leave running but this machine's time.
#
#   launch/local_processes.sh --processes=N --config=FILE --workdir=DIR [--devices=K] [--python=PYTHON] [--dry_run] \
#       [-- --config.section.key=value ...]
#
#   --devices  of each process (default: 1); the mesh has N * K of them in all
#   --port     of the coordinator, process 0 (default: one that is free)
#   --python   the interpreter (default: .venv/bin/python, else python3)
#   --dry_run  prints the commands and runs none of them
#
# SIGTERM and SIGINT go to all processes. Where one ends badly the others, which would wait for it, are ended too. The
# exit code is that of the first that ended badly: 75 where the run was told to stop and goes on when it is started again.
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

# Below the ports that the system gives to whoever asks for any.
free_port() {
  local candidate
  for candidate in $(shuf -i 20000-29999 -n 50); do
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no free port was found; give one as --port=N"
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
  # A signal to this script ends `wait` too: only those count that are gone.
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then alive+=("$pid"); fi
  done
  gone=$((running - ${#alive[@]}))
  running=${#alive[@]}
  pids=(${alive[@]+"${alive[@]}"})
  if ((gone && ended && code == 0)); then
    code=$ended
    # Those that fail alike, or save because they were told to, end by themselves; the others never would.
    (sleep "${SPECJAX_GRACE_SECONDS:-20}"; stop_all KILL) >/dev/null 2>&1 &
    watcher=$!
  fi
done
[[ -z ${watcher:-} ]] || kill "$watcher" 2>/dev/null || true
exit "$code"

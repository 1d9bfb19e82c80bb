#!/usr/bin/env bash
# Runs a config on a Cloud TPU slice: requests it, waits, copies this checkout to it, runs on every host, fetches the
# workdir of the first host, and deletes the slice.
#
#   launch/tpu_vm.sh --project=P --zone=Z --type=v5litepod-8 --runtime=v2-alpha-tpuv5-lite \
#       --config=configs/quickstart.py --workdir=runs/quickstart [--on_demand] [--keep] [--dry_run] \
#       [-- --config.section.key=value ...]
#
#   --name       name of the slice (default: specjax)
#   --on_demand  not preemptible; without it the slice is a spot slice, and the same command resumes from what the last
#                run fetched
#   --keep       do not delete the slice at the end; a slice that existed before is used and never deleted
#   --dry_run    print the commands without running them
#
# A slice of several hosts needs a --workdir that all of them share (an absolute path on a mounted file system), since
# all hosts write the checkpoint of a sharded model. Such a workdir is neither copied nor fetched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

name=specjax project="" zone="" type="" runtime="" config="" workdir=""
on_demand=false keep=false
take_arguments "name project zone type runtime config workdir" "on_demand keep" "$@"
need project zone type runtime config workdir

provisioning=()
$on_demand || provisioning=(--spot)
place=(--project="$project" --zone="$zone")

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
}

give_back() {
  $keep || run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# The results exist on the slice only, so it is kept, and billed until you delete it.
fetch_failed() {
  keep=true
  fail "$workdir could not be fetched, so the slice is kept; fetch it, then delete the slice with:" \
    "gcloud compute tpus queued-resources delete $name ${place[*]} --force"
}

wait_for_slice() {
  printf '+ %s\n' "gcloud compute tpus queued-resources describe $name ${place[*]}  # until ACTIVE" >&2
  $dry_run && return
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) fail "the slice $name is $now; try again or use another zone" ;;
    esac
    echo "$name is ${now:-not listed yet}; waiting" >&2
    sleep 30
  done
}

if $dry_run || ! state >/dev/null 2>&1; then
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" ${provisioning[@]+"${provisioning[@]}"}
  # From here on the slice costs money: it is deleted however this script ends.
  trap give_back EXIT
fi
wait_for_slice

archive=${TMPDIR:-/tmp}/$name.$$.tar.gz
shared=false
[[ $workdir == /* ]] && shared=true
content=(specjax configs pyproject.toml requirements.txt)
if ! $shared && [[ -d $workdir ]]; then
  content+=("$workdir")
fi
run tar --exclude=__pycache__ -czf "$archive" "${content[@]}"
run gcloud compute tpus tpu-vm scp "$archive" "$name:specjax.tar.gz" "${place[@]}" --worker=all
run rm "$archive"
# The images have Python 3.10; uv installs a newer one.
on_all "mkdir -p specjax && tar -xzf specjax.tar.gz -C specjax && cd specjax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.13 .venv && \
python3 -m uv pip install --quiet --python .venv/bin/python 'jax[tpu]' --requirement requirements.txt"

command="cd specjax && SPECJAX_MULTIPROCESS=1 .venv/bin/python -m specjax.main"
command+=$(printf ' %q' --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"})
finished=true
on_all "$command" || finished=false
if ! $shared; then
  run mkdir -p "$(dirname "$workdir")"
  run gcloud compute tpus tpu-vm scp --recurse "$name:specjax/$workdir" "$(dirname "$workdir")/" \
    "${place[@]}" --worker=0 || fetch_failed
fi
$finished || fail "the run failed; its results are in $workdir, and the same command resumes it"

#!/usr/bin/env bash
# Runs a config on a GKE cluster of TPUs with xpk: creates the cluster on request, starts the run on every host, follows
# its log, removes the run from the cluster, and deletes a cluster that it created.
#
#   launch/xpk.sh --project=P --zone=Z --cluster=C --type=v5litepod-16 --config=configs/a.py --workdir=/mnt/shared/a \
#       [--slices=N] [--storage=NAME] [--restarts=N] [--create] [--on_demand] [--keep] [--dry_run] \
#       [-- --config.section.key=value ...]
#
#   --name       name of the run (default: specjax)
#   --slices     number of slices of that type (default: 1); mesh.data must be a multiple of it
#   --image      image to which this checkout is added (default: python:3.12)
#   --storage    an xpk storage of the cluster (`xpk storage list`) to mount; --workdir must be on it, since hosts share
#                the workdir and pods are temporary
#   --restarts   how often a failed or stopped run is restarted (default: 20); it resumes at its checkpoint
#   --create     create the cluster first, and delete it at the end
#   --on_demand  for a created cluster: not preemptible; without it the nodes are spot nodes
#   --keep       neither remove the run from the cluster nor delete the cluster
#   --dry_run    print the commands without running them
#
# A cluster is billed until it is deleted, whether anything runs on it or not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/common.sh

name=specjax slices=1 image=python:3.12 restarts=20
project="" zone="" cluster="" type="" config="" workdir="" storage=""
create=false on_demand=false keep=false
take_arguments "name slices image restarts project zone cluster type config workdir storage" "create on_demand keep" "$@"
need project zone cluster type config workdir
[[ $workdir == /* ]] || fail "--workdir is $workdir; pods are temporary, so give an absolute path on a shared storage"

provisioning=--on-demand
$on_demand || provisioning=--spot
place=(--cluster="$cluster" --project="$project" --zone="$zone")

clean_up() {
  $keep && return
  run xpk workload delete --workload="$name" "${place[@]}" --force || true
  if $create; then
    run xpk cluster delete "${place[@]}" --force ||
      echo "error: the cluster $cluster is still there, and billed until it is deleted" >&2
  fi
}

if $create; then
  # From here on the cluster costs money: it is deleted however this script ends.
  trap clean_up EXIT
  run xpk cluster create "${place[@]}" --tpu-type="$type" --num-slices="$slices" "$provisioning"
fi

command="pip install --quiet 'jax[tpu]' --requirement requirements.txt && exec python -m specjax.main"
command+=$(printf ' %q' --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"})
mounted=()
[[ -z $storage ]] || mounted=(--storage="$storage")
run xpk workload create "${place[@]}" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
  --base-docker-image="$image" --script-dir=. --max-restarts="$restarts" --restart-on-user-code-failure \
  --termination-grace-period-seconds=120 ${mounted[@]+"${mounted[@]}"} \
  --command="$command"
trap clean_up EXIT

# Follow the log of the first host while it exists; xpk then reports whether the run succeeded.
selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
run kubectl logs --follow --selector="$selector" --pod-running-timeout=24h --ignore-errors || true
run xpk workload list "${place[@]}" --wait-for-job-completion="$name" ||
  fail "the run failed; its results are in $workdir, and the same command resumes it"

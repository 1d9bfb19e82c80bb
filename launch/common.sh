# shellcheck shell=bash
# Shared by the launchers, which source this file: reading arguments, reporting a mistake in one sentence, and running
# commands, which a dry run only prints. slurm.sbatch cannot source it, since Slurm runs a copy from another folder.

dry_run=false

fail() {
  echo "error: $*" >&2
  exit 2
}

# take_arguments VALUES SWITCHES "$@": --zone=Z sets `zone` if VALUES contains that word; --keep sets `keep` to true if
# SWITCHES contains it, and --dry_run is always allowed; everything after -- goes into `overrides`.
take_arguments() {
  local values=" $1 " switches=" $2 dry_run "
  shift 2
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 =~ ^--([a-z_]+)= && $values == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" '%s' "${1#*=}"
    elif [[ $1 =~ ^--([a-z_]+)$ && $switches == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" true
    else
      fail "unknown argument $1; see the first lines of $0"
    fi
    shift
  done
  # shellcheck disable=SC2034  # launchers read it
  overrides=("${@:2}")
}

need() {
  local flag
  for flag in "$@"; do
    [[ -n ${!flag} ]] || fail "--$flag is missing; see the first lines of $0"
  done
}

show() {
  printf '+ %s\n' "$(printf '%q ' "$@")" >&2
}

run() {
  show "$@"
  $dry_run || "$@"
}

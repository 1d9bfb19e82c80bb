# shellcheck shell=bash
# What launchers share: their arguments, one sentence for a mistake, and commands that a dry run prints and does not run.
# It is sourced. (A script of Slurm stands alone: Slurm runs a copy of it that lies elsewhere.)

dry_run=false

fail() {
  echo "error: $*" >&2
  exit 2
}

# take_arguments VALUES SWITCHES "$@": --zone=Z sets `zone` where VALUES has that word, --keep sets `keep` to true where
# SWITCHES does, or --dry_run; what comes behind -- is `overrides`.
take_arguments() {
  local values=" $1 " switches=" $2 dry_run "
  shift 2
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 =~ ^--([a-z_]+)= && $values == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" '%s' "${1#*=}"
    elif [[ $1 =~ ^--([a-z_]+)$ && $switches == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" true
    else
      fail "$1 is not understood; see the first lines of $0"
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

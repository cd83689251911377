# shellcheck shell=bash disable=SC2034 # the scripts that source this read the variables it sets
# The common part of the scripts beside this one. They run in the folder of the clone, and source it from there.

python=${PYTHON:-.venv/bin/python}

# Sets dry_run, and rest to the flags after it.
read_dry_run() {
  dry_run=false
  if [[ ${1-} == --dry_run ]]; then
    dry_run=true
    shift
  fi
  rest=("$@")
}

# Sets workdir, and flags to those of experiments.train: compiled programs lie beside the workdir, where
# they outlive the machine, unless a flag says otherwise. In a bucket JAX's cache cannot be, so a run
# there has it where its config says.
read_flags() {
  local flag cache=""
  workdir=""
  for flag in "$@"; do
    case $flag in
      --workdir=*) workdir=${flag#--workdir=} ;;
      --config.compilation_cache=*) cache=$flag ;;
    esac
  done
  [[ $workdir ]] || {
    echo "${0##*/}: write --workdir=DIR; where there are several machines, on a file system of all, or gs://" >&2
    exit 2
  }
  flags=("$@")
  if [[ ! $cache && $workdir != *://* ]]; then
    flags+=("--config.compilation_cache=${workdir%/}.programs")
  fi
}

# Refuses flags that the script itself sets.
without_distributed() {
  local flag
  for flag in "$@"; do
    [[ $flag != --distributed* && $flag != -distributed* ]] || {
      echo "${0##*/}: leave out $flag: this script says how the processes find each other" >&2
      exit 2
    }
  done
}

# Prints one line that a shell reads as these words.
quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

# Tells whether the run in $workdir has its result: one that was asked to stop has saved, and ended with 0.
finished() {
  case $workdir in
    *://*)
      "$python" -c 'import sys
from etils import epath
sys.exit(not (epath.Path(sys.argv[1]) / "result.json").exists())' "$workdir"
      ;;
    *) [[ -e $workdir/result.json ]] ;;
  esac
}

#!/usr/bin/env bash
# Trains in a container, as one of the processes of a run. Flags are those of experiments.train.
#
# Whoever starts containers starts again those that fail. A run that was asked to stop has saved and
# ends with 0; where it has no result yet, this ends with 75 instead, so that it is started again and
# goes on. PYTHON names the interpreter (.venv/bin/python). With --dry_run as the first flag it prints
# the command it would run.
set -euo pipefail
source launch/flags.sh
read_dry_run "$@"
read_flags "${rest[@]}"

command=("$python" -m experiments.train "${flags[@]}")
if $dry_run; then
  quoted "${command[@]}"
  exit
fi
"${command[@]}" &
id=$! signalled=true
trap 'signalled=true; kill -TERM "$id" 2> /dev/null || true' TERM INT
while $signalled; do
  signalled=false code=0
  wait "$id" || code=$?
done
((code == 0)) || exit "$code"
finished || exit 75

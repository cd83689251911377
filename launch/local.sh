#!/usr/bin/env bash
# Trains in several processes of this machine. The first argument says how many, the flags are those of
# experiments.train:
#
#   launch/local.sh 2 --config=configs/classify.py:method=lora,data=bbc --workdir=runs/two --mesh=data:-1
#
# Process 0 prints; complaints of another one start with its number. SIGTERM and Ctrl-C reach
# each process once: they save and end with 0. If one dies, the others are ended. The same command goes
# on. The exit code is the largest of theirs. PYTHON names the interpreter (.venv/bin/python). With
# --dry_run as the first flag it prints the commands it would run.
set -euo pipefail
source launch/flags.sh
read_dry_run "$@"
count=${rest[0]-}
[[ $count =~ ^[1-9][0-9]{0,2}$ ]] || {
  echo "local.sh: write how many processes first, 1 to 999: launch/local.sh 2 --config=... --workdir=..." >&2
  exit 2
}
without_distributed "${rest[@]:1}"
read_flags "${rest[@]:1}"

port=PORT
$dry_run || port=$("$python" -c 'import socket
free = socket.create_server(("localhost", 0))
print(free.getsockname()[1])')

# The command of process $1.
set_command() {
  command=("$python" -m experiments.train "--distributed=localhost:$port,$count,$1" "${flags[@]}")
}

if $dry_run; then
  for ((i = 0; i < count; i++)); do
    set_command "$i"
    quoted "${command[@]}"
  done
  exit
fi

patience=15      # seconds for the others to report the cause
declare -A alive # number of a process by its id
pass() { kill "-$1" "${!alive[@]}" 2> /dev/null || true; }

set -m # each process is a group of its own: Ctrl-C in a terminal reaches this script alone
trap 'pass INT' INT
trap 'pass TERM' TERM HUP
for ((i = 0; i < count; i++)); do
  set_command "$i"
  if ((i)); then
    "${command[@]}" < /dev/null 2> >(trap '' INT TERM HUP; exec sed -u "s/^/$i: /" >&2) &
  else
    "${command[@]}" < /dev/null &
  fi
  alive[$!]=$i
done

worst=0 reaper=""
while ((${#alive[@]})); do
  sleep 0.2 & # in place of wait -n, which forgets one that ends between two calls
  wait $! || true
  for id in "${!alive[@]}"; do
    ! kill -0 "$id" 2> /dev/null || continue
    code=0
    wait "$id" 2> /dev/null || code=$?
    number=${alive[$id]}
    unset "alive[$id]"
    ((code > worst)) && worst=$code
    if ((code && ${#alive[@]})) && [[ ! $reaper ]]; then
      echo "local.sh: process $number ended with $code; the others end now, and the same command goes on" >&2
      { sleep "$patience"; pass KILL; } &
      reaper=$!
      disown "$reaper" # or bash tells that it was ended
    fi
  done
done
[[ ! $reaper ]] || kill -- "-$reaper" 2> /dev/null || true
exit "$worst"

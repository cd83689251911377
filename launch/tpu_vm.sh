#!/usr/bin/env bash
# Trains on a Cloud TPU, on all workers of a queued resource. Flags are those of experiments.train:
#
#   export TPU_NAME=pod TPU_PROJECT=... TPU_ZONE=us-west4-a
#   export TPU_TYPE=v5litepod-16 TPU_RUNTIME=v2-alpha-tpuv5-lite TPU_SPOT=true
#   export TPU_STARTUP=mount.sh     # a script that each worker runs as root when it starts, if any
#   launch/tpu_vm.sh create         asks for the TPU, and waits until it is there
#   launch/tpu_vm.sh setup          brings the commit that is checked out here, and its packages
#   launch/tpu_vm.sh run FLAGS      starts, or starts again, and shows the output of worker 0
#   launch/tpu_vm.sh logs [N]       shows the output of worker 0, or N
#   launch/tpu_vm.sh resume FLAGS   all of it until the run has its result: a new TPU after a preemption
#   launch/tpu_vm.sh delete
#
# Ctrl-C ends the display; the run goes on. The workdir lies in a bucket, or on a file system that
# all workers share and that outlives them. With --dry_run as the first flag it prints its commands.
set -euo pipefail
source launch/flags.sh
read_dry_run "$@"
verb=${rest[0]-}

usage() { sed -n '4,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ $verb =~ ^(create|setup|run|logs|resume|delete)$ ]] || usage
for name in TPU_NAME TPU_PROJECT TPU_ZONE TPU_TYPE TPU_RUNTIME; do
  [[ ${!name-} ]] || { echo "tpu_vm.sh: $name is not set" >&2; usage; }
done

# gcloud compute tpus $1 $2 of this TPU.
gcloud_tpus() {
  local command=(gcloud compute tpus "$1" "$2" "--project=$TPU_PROJECT" "--zone=$TPU_ZONE" "${@:3}")
  if $dry_run; then quoted "${command[@]}"; else "${command[@]}"; fi
}
on_worker() { gcloud_tpus tpu-vm ssh "$TPU_NAME" "--worker=$1" --command="cd peftjax && $2"; }
worker_script() { quoted launch/tpu_worker.sh "$@"; }

# A machine that has just come may not let anybody in yet.
again() {
  for _ in {1..4}; do
    "$@" && return
    pause
  done
  "$@"
}
pause() { sleep 30; }

# The state of the queued resource; NONE if there is none.
state() {
  local told
  if told=$(gcloud_tpus queued-resources describe "$TPU_NAME" '--format=value(state.state)' 2>&1); then
    echo "$told"
  elif [[ $told == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$told" >&2
    return 1
  fi
}
ask_for_it() {
  gcloud_tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" \
    "--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_RUNTIME" ${TPU_SPOT:+--spot} \
    ${TPU_STARTUP:+"--metadata-from-file=startup-script=$TPU_STARTUP"} --async
}
delete() { gcloud_tpus queued-resources delete "$TPU_NAME" --force --quiet; }

# Returns when the TPU is there. A preempted one never comes back by itself.
create() {
  local now before=""
  if $dry_run; then
    ask_for_it
    return
  fi
  while true; do
    now=$(again state)
    [[ $now == "$before" ]] || echo "tpu_vm.sh: $TPU_NAME is $now" >&2
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE) ask_for_it ;;
      SUSPENDED | FAILED) delete ;;
    esac
    pause
  done
}

setup() {
  local bundle=peftjax.bundle
  if ! $dry_run; then
    [[ ! $(git status --porcelain --untracked-files=no) ]] || {
      echo "tpu_vm.sh: workers get what is committed; commit your changes first" >&2
      exit 1
    }
    bundle=$(mktemp -d)/peftjax.bundle
    git bundle create -q "$bundle" HEAD
  fi
  again gcloud_tpus tpu-vm scp "$bundle" "$TPU_NAME:peftjax.bundle" --worker=all || return
  again gcloud_tpus tpu-vm ssh "$TPU_NAME" --worker=all --command="git init -q peftjax && cd peftjax && \
git fetch -q ../peftjax.bundle HEAD && git checkout -q --detach FETCH_HEAD && $(worker_script install)"
}

start() { again on_worker all "$(worker_script start "$@")"; }
follow() { on_worker "${1-0}" "$(worker_script follow)"; }

resume() {
  local code failures=0
  while true; do
    create
    code=0
    { setup && start "$@" && follow; } || code=$?
    while ((code == 255)) && [[ $(state) == ACTIVE ]]; do # only the connection is gone
      pause
      code=0
      follow || code=$?
    done
    if on_worker 0 "$(worker_script finished "$@")"; then
      return
    fi
    if ((code == 0)) || [[ $(state) != ACTIVE ]]; then # it was asked to stop, or the TPU is gone
      failures=0
    elif ((++failures == 3)); then
      echo "tpu_vm.sh: the run failed three times in a row, with $code; see launch/tpu_vm.sh logs" >&2
      return "$code"
    fi
    pause
  done
}

case $verb in
  create) create ;;
  setup) setup ;;
  run)
    without_distributed "${rest[@]:1}"
    read_flags "${rest[@]:1}"
    start "${rest[@]:1}"
    follow
    ;;
  logs) follow "${rest[@]:1:1}" ;;
  resume)
    without_distributed "${rest[@]:1}"
    read_flags "${rest[@]:1}"
    resume "${rest[@]:1}"
    ;;
  delete) delete ;;
esac

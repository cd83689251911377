#!/usr/bin/env bash
# Commands that launch/tpu_vm.sh runs on each worker of a TPU VM, in the clone there:
#
#   tpu_worker.sh install          Python, the locked packages, JAX's for TPUs and gcsfs, into .venv
#   tpu_worker.sh start FLAGS      trains in the background, into run.log, once an earlier run has ended
#   tpu_worker.sh follow           shows run.log until the run ends, and ends with its exit code
#   tpu_worker.sh finished FLAGS   tells whether the run in the workdir has its result
set -euo pipefail
source launch/flags.sh

# The images of TPU VMs have an older Python than this needs: uv brings one.
install() {
  if cmp -s requirements.lock .venv/.installed; then
    return
  fi
  local uv=(python3 -m uv)
  python3 -m pip install -q --user "$(sed -n 's/^UV = //p' Makefile)"
  "${uv[@]}" venv -q --clear --python 3.12 .venv
  "${uv[@]}" pip install -q --python "$python" --no-deps --require-hashes -r requirements.lock
  "${uv[@]}" pip install -q --python "$python" --no-build-isolation -e '.[tpu,gcs]'
  cp requirements.lock .venv/.installed
}

# Tells whether a process of that number trains: another one may have the number by now.
trains() { grep -qsz experiments.train "/proc/$1/cmdline"; }

# Asks an earlier run to save and end; after two minutes it has to.
end_earlier() {
  local id
  id=$(cat run.pid 2> /dev/null) || return 0
  trains "$id" || return 0
  kill -TERM "$id"
  for _ in {1..120}; do
    trains "$id" || return 0
    sleep 1
  done
  kill -KILL "$id"
}

case ${1-} in
  install) install ;;
  start)
    read_flags "${@:2}"
    end_earlier
    rm -f run.pid run.code
    setsid "$0" work "${flags[@]}" < /dev/null >> run.log 2>&1 &
    until [[ -s run.pid ]]; do sleep 0.1; done
    ;;
  work) # in the background, for start
    code=0
    "$python" -m experiments.train --distributed=auto "${@:2}" &
    echo $! > run.pid
    wait $! || code=$?
    echo "$code" > run.code
    ;;
  follow)
    tail -n 100 --pid="$(< run.pid)" -F run.log 2> /dev/null
    for _ in {1..50}; do
      [[ ! -s run.code ]] || exit "$(< run.code)"
      sleep 0.1
    done
    exit 1
    ;;
  finished)
    read_flags "${@:2}"
    finished
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac

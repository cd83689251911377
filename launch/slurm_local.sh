#!/usr/bin/env bash
# A SLURM cluster of this machine alone, for tests: the real daemons, their files in one folder.
#
#   launch/slurm_local.sh start DIR     then: export SLURM_CONF=DIR/slurm.conf
#   launch/slurm_local.sh stop DIR
#
# Needs root and slurmctld, slurmd, munged (Debian: apt-get install slurm-wlm munge).
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ $# == 2 && $1 =~ ^(start|stop)$ ]] || usage
mkdir -p "$2"
dir=$(cd "$2" && pwd)

stop() {
  for daemon in slurmd slurmctld munged; do
    if [[ -s $dir/$daemon.pid ]]; then
      kill "$(< "$dir/$daemon.pid")" 2> /dev/null || true
    fi
  done
}

if [[ $1 == stop ]]; then
  stop
  exit
fi
[[ $(id -u) == 0 ]] || { echo "slurm_local: needs root, to start the daemons" >&2; exit 1; }
for tool in slurmctld slurmd munged sinfo; do
  command -v "$tool" > /dev/null || {
    echo "slurm_local: '$tool' is missing (Debian: apt-get install slurm-wlm munge)" >&2
    exit 1
  }
done

# A requeued job waits until its credential has expired, two minutes where cred_expire says nothing.
mkdir -p "$dir/state" "$dir/spool"
(umask 077; head -c 1024 /dev/urandom > "$dir/munge.key")
node=$(hostname -s)
cat > "$dir/slurm.conf" << END
ClusterName=local
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$((20000 + RANDOM % 10000))
SlurmdPort=$((30000 + RANDOM % 2000))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=60
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$dir/slurm.conf
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
  --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
slurmctld
slurmd -N "$node"
for _ in $(seq 60); do
  if [[ $(sinfo --noheader --format=%t 2> /dev/null) == idle ]]; then
    echo "SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 1
done
echo "slurm_local: the node is not idle after a minute; see $dir/*.log" >&2
stop
exit 1

#!/usr/bin/env bash
#SBATCH --job-name=peftjax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Trains on the nodes of a SLURM job, one process per task. Flags are those of experiments.train:
#
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/causal_lm.py:quant=nf4,method=lora --workdir=/shared/run --mesh=fsdp:-1
#
# Two minutes before the time limit, on preemption, and on scancel --signal=TERM JOB the run saves, and
# the job queues itself again and goes on from there; scancel JOB ends it. The workdir lies on a file
# system that all nodes share. PYTHON names the interpreter (.venv/bin/python). With --dry_run as the
# first flag it prints the command it would run, and needs no SLURM.
set -euo pipefail
source launch/flags.sh # not beside this file: SLURM runs a copy of it, in the folder of sbatch
read_dry_run "$@"
without_distributed "${rest[@]}"
read_flags "${rest[@]}"

command=(srun "$python" -m experiments.train --distributed=auto "${flags[@]}")
if $dry_run; then
  quoted "${command[@]}"
  exit
fi
command -v srun > /dev/null || {
  echo "slurm.sh: there is no srun here; submit it where SLURM is: sbatch --nodes=2 launch/slurm.sh ..." >&2
  exit 1
}
"${command[@]}"
if ! finished; then # it was asked to stop, and has saved
  scontrol requeue "$SLURM_JOB_ID"
fi

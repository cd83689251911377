"""Workers as jobs of SLURM, through submitit; their logs lie in the sweep's folder, in slurm/.

Partition, account, time limit and whatever else belongs to a site are sbatch's own variables, such
as SBATCH_PARTITION and SBATCH_TIMELIMIT.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from experiments.sweeping import remote
from experiments.sweeping.executor import End
from experiments.sweeping.remote import Job

_EVERY = 2.0  # seconds between two looks at the queue
_SAVING = 120  # seconds before its time limit at which a worker saves and stops


class Slurm:
  """Each worker is a job of one task."""

  def __init__(self, job: Job, resources: dict[str, int]):
    """Submits nothing yet.

    Raises:
      ValueError: SLURM is not here, or a worker asks for a TPU.
    """
    for tool in ("sbatch", "srun", "squeue", "scancel"):
      if shutil.which(tool) is None:
        raise ValueError(
          f"--executor=slurm needs SLURM's {tool} here; run it where jobs are submitted from"
        )
    if "tpu" in resources:
      raise ValueError("--executor=slurm knows cpu and gpu, and no tpu; use --executor=ray")
    self._job = job
    self._executor = submitit.SlurmExecutor(folder=Path(job.root) / "slurm")
    self._executor.update_parameters(
      job_name="peftjax-sweep",
      time=None,  # the partition's, not submitit's five minutes
      signal_delay_s=_SAVING,
      cpus_per_task=resources.get("cpu"),
      gpus_per_node=resources.get("gpu"),
    )

  def start(self) -> Any:
    try:
      return self._executor.submit(_work, self._job)
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
      told = " ".join(str(error).split())[-300:]
      raise ValueError(f"sbatch does not take a worker's job: {told}") from None

  def ended(self, workers: Sequence[Any]) -> dict[Any, End]:
    time.sleep(_EVERY)
    # submitit asks sacct, which not every cluster keeps.
    told = subprocess.run(
      ["squeue", "--me", "--noheader", "--format=%i"], capture_output=True, text=True
    )
    if told.returncode:  # the controller is away for a moment: nothing is known
      return {}
    queued = set(told.stdout.split())
    return {worker: _end(worker) for worker in workers if worker.job_id not in queued}

  def stop(self, workers: Sequence[Any]) -> None:
    for worker in workers:
      worker.cancel(check=False)


def _work(job: Job) -> str:
  """`remote.work`, with SLURM's warning of the time limit as one of the signals that stop it."""
  signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  return remote.work(job)


def _end(worker: Any) -> End:
  if not worker.paths.result_pickle.exists():
    return End(f"job {worker.job_id} left no result; see {worker.paths.stderr}", died=True)
  if error := worker.exception():
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    return End(f"job {worker.job_id}: {last.strip()[:300]}; see {worker.paths.stderr}", died=True)
  return End(worker.result(), died=False)

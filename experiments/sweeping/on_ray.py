"""Workers as Ray's tasks: on the cluster of RAY_ADDRESS, or one of this machine alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from experiments.sweeping import remote
from experiments.sweeping.executor import End
from experiments.sweeping.remote import Job

_NAMES = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}
_SAVING = 300.0  # seconds in which a worker that was asked to stop has saved


class Ray:
  """Each worker is a task in a process of its own, with its resources and one CPU otherwise."""

  def __init__(self, job: Job, resources: dict[str, int]):
    """Joins the cluster, or starts one.

    Raises:
      ValueError: it is not there, or no node of it has what a worker asks for.
    """
    try:
      ray.init(log_to_driver=False, include_dashboard=False)
    except ConnectionError as error:
      raise ValueError(f"--executor=ray finds no cluster: {error}") from None
    self._job = job
    wanted = {"CPU": 1, **{_NAMES[name]: number for name, number in resources.items()}}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(k, 0) >= v for k, v in wanted.items()) for node in nodes):
      has = "; ".join(", ".join(f"{k} {node.get(k, 0):g}" for k in wanted) for node in nodes)
      shown = ", ".join(f"{k} {v}" for k, v in wanted.items())
      raise ValueError(f"no node of the Ray cluster has {shown} for a worker; they have {has}")
    cpus, gpus = wanted.pop("CPU"), wanted.pop("GPU", 0)
    # A worker that dies is followed by another if there is work left, not by Ray's retry.
    self._task = ray.remote(remote.work).options(
      num_cpus=cpus, num_gpus=gpus, resources=wanted, max_retries=0
    )

  def start(self) -> Any:
    return self._task.remote(self._job)

  def ended(self, workers: Sequence[Any]) -> dict[Any, End]:
    ready, _ = ray.wait(list(workers), num_returns=1, timeout=1)
    return {worker: _end(worker) for worker in ready}

  def stop(self, workers: Sequence[Any]) -> None:
    """Stops workers and waits for them: they would be killed with this process."""
    for worker in workers:
      ray.cancel(worker)
    ray.wait(list(workers), num_returns=len(workers), timeout=_SAVING)


def _end(worker: Any) -> End:
  try:
    return End(ray.get(worker), died=False)
  except ray.exceptions.RayTaskError as error:
    return End(f"{type(error.cause).__name__}: {error.cause}", died=True)
  except ray.exceptions.RayError as error:
    return End(" ".join(str(error).split())[:300], died=True)

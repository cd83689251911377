"""Several workers on one folder, wherever they are started; keeps up their number."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from experiments.sweeping.plan import Plan
from experiments.sweeping.remote import Job
from peftjax.training import process

_SPARE = 2  # deaths above one of every worker, with no trial ended between: then it is no accident
_EXTRAS = {"ray": ("ray", "ray"), "slurm": ("submitit", "slurm")}


class End(NamedTuple):
  """The end of a worker: its or its cluster's message, and whether it was not its own decision."""

  said: str
  died: bool


class Executor(Protocol):
  """Starts workers; what they do, and who does what, is in the folder alone."""

  def start(self) -> Any:
    """Starts a new worker, which may have to wait for its resources."""

  def ended(self, workers: Sequence[Any]) -> Mapping[Any, End]:
    """The workers that have ended; looks for a second or so."""

  def stop(self, workers: Sequence[Any]) -> None:
    """Asks workers to save their state, and to end."""


class Follower(Protocol):
  """Hears of events elsewhere."""

  def follows(self) -> None: ...
  def says(self, text: str) -> None: ...


def drive(executor: Executor, count: int, plan: Plan, follower: Follower) -> None:
  """Keeps `count` workers while anything is left for one that ends; returns when all have ended.

  Raises:
    ValueError: they die one after the other, and no trial ends; or the cluster takes no worker.
    KeyboardInterrupt: after SIGTERM, SIGHUP or Ctrl-C; the workers were asked to save and to stop.
  """
  deaths, done, last = 0, _ended(plan), ""
  follower.follows()
  with process.interrupts():
    workers: list[Any] = []
    try:
      while len(workers) < count:
        workers.append(executor.start())
      while workers:
        for worker, (said, died) in executor.ended(workers).items():
          workers.remove(worker)
          if died:
            now = _ended(plan)
            deaths, done, last = (1 if now > done else deaths + 1), now, said
          again = plan.left() and deaths < count + _SPARE
          if again:
            workers.append(executor.start())
          if said:
            follows = "; another one takes its place" if again else ""
            follower.says(f"a worker has {'died' if died else 'stopped'}: {said}{follows}")
        follower.follows()
    except BaseException:
      if workers:
        follower.says(f"workers are asked to save and to stop: {len(workers)}")
        executor.stop(workers)
      raise
  if plan.left():
    raise ValueError(
      f"{deaths} workers died, and no trial ended meanwhile; the last: {last}. Run the same "
      "command to go on."
    )


def _ended(plan: Plan) -> int:
  return sum(plan.folder.ended(trial.id) for trial in plan.trials())


def make(name: str, job: Job, workers: int, resources: str) -> Executor | None:
  """The executor of a name, or None for "local", where this process is the worker.

  Args:
    name: local, ray or slurm.
    job: the work of every worker.
    workers: how many will be started.
    resources: resources of each, such as "cpu:4,gpu:1".

  Raises:
    ValueError: a package that it needs is not installed, or not there.
  """
  asked = _resources(resources)
  if name == "local":
    if workers > 1 or asked:
      raise ValueError(
        "--workers and --resources are for --executor=ray or slurm; on this machine, run the same "
        "command in another terminal for a second worker"
      )
    return None
  module, extra = _EXTRAS[name]
  if importlib.util.find_spec(module) is None:
    raise ValueError(f"--executor={name} needs {module}: pip install 'peftjax[{extra}]'")
  if name == "ray":
    from experiments.sweeping.on_ray import Ray

    return Ray(job, asked)
  from experiments.sweeping.on_slurm import Slurm

  return Slurm(job, asked)


def _resources(text: str) -> dict[str, int]:
  """The resources in "cpu:4,gpu:1", as `{"cpu": 4, "gpu": 1}`."""
  parts = text.split(",") if text else []
  found = [re.fullmatch(r"(cpu|gpu|tpu):([1-9]\d{0,5})", part) for part in parts]
  made = {match[1]: int(match[2]) for match in found if match}
  if len(made) != len(parts):
    raise ValueError(
      f"--resources={text} is not cpu, gpu or tpu with a number each, such as "
      "--resources=cpu:4,gpu:1"
    )
  return made

"""Runs the rest of a plan, for whichever command asks."""

from __future__ import annotations

from experiments.sweeping import executor, fields, summary, view
from experiments.sweeping.executor import Executor
from experiments.sweeping.plan import Plan
from peftjax.training.loop import Stopped
from peftjax.training.process import Again


def show_left(plan: Plan) -> None:
  """Prints the trials that are not done."""
  todo = plan.trials()
  listed = plan.folder.check(todo)
  states = summary.states(plan.folder, {trial.id: listed[trial.id] for trial in todo})
  apart = fields.varying(trial.overrides for trial in todo)
  for trial in todo:
    if (status := states[trial.id]["status"]) != "done":
      print(f"  {trial.id}  {status}  {fields.label(trial.overrides, apart)}")
  print(f"{len(todo)} trials: {summary.counts(states)}{plan.more}")


def work(plan: Plan, workers: Executor | None = None, count: int = 1) -> None:
  """Runs the rest, here or by `count` workers elsewhere; if stopped, it says how to go on."""
  try:
    with view.View(plan.folder) as watcher:
      if workers is None:
        plan.work(watcher)
      else:
        executor.drive(workers, count, plan, watcher)
  except Again:
    raise
  except (Stopped, KeyboardInterrupt) as stopped:
    states = summary.states(plan.folder, plan.folder.listed())
    what = str(stopped) or "stopped"
    raise Stopped(
      f"{what}\n{len(states)} trials: {summary.counts(states)}; run the same command to go on"
    ) from None

"""Runs many trials: a grid or a list over any fields of a config.

  python -m experiments.sweep --config=configs/sweeps/rank_budget.py --workdir=DIR

A sweep's file gives `base`, one `configs/NAME.py:ARGUMENT` or several, and what to change in it:
`grid`, values by field, all combined, and `trials`, a list of fields set together (with a base of
their own, if need be). A grid's field is a flag too: --config.grid.seed="(0,1)".

Each trial has an id from its config and runs in DIR/trials/ID as experiments.train would. Run the
same command again to go on after an interruption, which repeats no finished trial, and run it in
another terminal, or on another machine that shares DIR, for a second worker. A trial that fails
leaves DIR/trials/ID/error.json, and the rest go on; --retry_failed runs such ones again. More
values in the same DIR add trials.

Writes DIR/summary.jsonl, a line a trial that is done, and draws pareto.png and, of AdaLoRA,
ranks.png.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import config_flags

from experiments import runtime

if TYPE_CHECKING:
  from experiments.sweeping.folder import Folder
  from experiments.sweeping.summary import Listed
  from experiments.sweeping.trials import Trial

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/sweeps/NAME.py[:ARGUMENT].")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the sweep; made if it is not there.", required=True
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the trials that are left, and run none.")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run trials again that had failed.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; fields are given as --config.FIELD=VALUE")
  from experiments.sweeping import folder as folders
  from experiments.sweeping import summary, trials
  from peftjax.training import build

  todo = trials.expand(CONFIG.value)
  folder = folders.Folder(build.resolve(WORKDIR.value))
  runtime.set_up(todo[0].config.get("compilation_cache"))
  if DRY_RUN.value:
    show_left(folder, todo)
    return
  listed = folder.add(todo)
  if RETRY_FAILED.value:
    folder.forget_failures(todo)
  work(folder, todo, listed)
  written = summary.write(folder)
  report(folder, listed, written)


def show_left(folder: Folder, todo: list[Trial]) -> None:
  """Prints the trials that are not done."""
  from experiments.sweeping import fields, summary

  listed = folder.check(todo)
  states = summary.states(folder, {trial.id: listed[trial.id] for trial in todo})
  apart = fields.varying(trial.overrides for trial in todo)
  for trial in todo:
    if (status := states[trial.id]["status"]) != "done":
      print(f"  {trial.id}  {status}  {fields.label(trial.overrides, apart)}")
  print(f"{len(todo)} trials: {summary.counts(states)}")


def work(folder: Folder, todo: list[Trial], listed: Listed) -> None:
  """Runs what is left, with a table of it; stopped, it says how to go on."""
  from experiments.sweeping import summary, view, worker
  from peftjax.training.loop import Stopped
  from peftjax.training.process import Again

  try:
    with view.View(folder, listed) as watcher:
      worker.work(todo, folder, watcher, together=CONFIG.value.get("together", 1))
  except Again:
    raise
  except (Stopped, KeyboardInterrupt) as stopped:
    states = summary.states(folder, listed)
    what = str(stopped) or "stopped"
    raise Stopped(
      f"{what}\n{len(states)} trials: {summary.counts(states)}; run the same command to go on"
    ) from None


def report(folder: Folder, listed: Listed, written: list[str]) -> None:
  """Prints the table of all trials; exit code 1 if one had failed."""
  import rich

  from experiments.sweeping import summary

  states = summary.states(folder, listed)
  rich.get_console().print(summary.table(listed, states))
  print(f"Written: {', '.join(str(folder.root / name) for name in written)}")
  elsewhere = sum(state["status"] == "running elsewhere" for state in states.values())
  if elsewhere:
    print(f"{elsewhere} still run elsewhere: whoever ends last writes these with all trials.")
  failed = [name for name, state in states.items() if state["status"] == "failed"]
  if failed:
    where = "\n".join(f"  {folder.trial(x)}/error.json: {states[x]['value']}" for x in failed)
    print(f"error: {len(failed)} failed; --retry_failed runs them again:\n{where}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=runtime.parse_flags)

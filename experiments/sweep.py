"""Runs many trials: a grid or a list over any fields of a config.

  python -m experiments.sweep --config=experiments/tables/rank_budget.py --workdir=DIR

A sweep's file gives `base`, one `configs/NAME.py:ARGUMENT` or several, and what to change in it:
`grid`, values by field, all combined, and `trials`, a list of fields set together (with a base of
their own, if need be). A grid's field is a flag too: --config.grid.seed="(0,1)".

`optuna` in its place lets Optuna propose trials one after the other, from the validation scores of
those before: how many, and the values of each field (see `experiments.sweeping.search.Section`).

Each trial has an id from its config and runs in DIR/trials/ID as experiments.train would. Run the
same command again to go on after an interruption, which repeats no finished trial, and run it in
another terminal, or on another machine that shares DIR, for a second worker. A trial that fails
leaves DIR/trials/ID/error.json, and the rest go on; --retry_failed runs such ones again. More
values in the same DIR add trials.

--executor=ray and --executor=slurm start --workers=N such workers on a cluster, each with its
--resources, replace those that die, and show here how the trials go. Ray's cluster is that
of RAY_ADDRESS, or this machine; SLURM's jobs obey sbatch's variables (SBATCH_PARTITION and others).
DIR has to lie on a file system that all of them share.

Writes DIR/summary.jsonl, one line per finished trial, and draws pareto.png and, for AdaLoRA,
ranks.png.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import config_flags

from experiments import runtime

if TYPE_CHECKING:
  from experiments.sweeping.folder import Folder

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/sweeps/NAME.py[:ARGUMENT].")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Local folder of the sweep; made if it is not there.", required=True
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the trials that are left, and run none.")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run trials again that had failed.")
EXECUTOR = flags.DEFINE_enum(
  "executor",
  "local",
  ["local", "ray", "slurm"],
  "Where workers run: local is this process; ray and slurm start --workers on a cluster.",
)
WORKERS = flags.DEFINE_integer(
  "workers", 1, "Number of workers that ray or slurm start.", lower_bound=1, upper_bound=10_000
)
RESOURCES = flags.DEFINE_string(
  "resources", "", "Resources of each worker of ray or slurm: cpu, gpu and tpu, as in cpu:4,gpu:1."
)


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  from experiments.sweeping import driver, executor, plan, summary
  from experiments.sweeping.folder import Folder
  from experiments.sweeping.remote import Job
  from peftjax.training import build

  folder = Folder(build.resolve(WORKDIR.value))
  todo = plan.of(CONFIG.value, folder)
  runtime.set_up(todo.config.get("compilation_cache"))
  if DRY_RUN.value:
    driver.show_left(todo)
    return
  job = Job(CONFIG.value.to_dict(), str(folder.root), os.getcwd())
  workers = executor.make(EXECUTOR.value, job, WORKERS.value, RESOURCES.value)
  folder.add(todo.trials())
  if RETRY_FAILED.value:
    folder.forget_failures(todo.trials())
  driver.work(todo, workers, WORKERS.value)
  report(folder, summary.write(folder))


def report(folder: Folder, written: list[str]) -> None:
  """Prints the table of all trials; exit code 1 if one had failed."""
  import rich

  from experiments.sweeping import summary

  listed = folder.listed()
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

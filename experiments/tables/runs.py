"""Tables of runs: a sweep makes the runs, and the table is a view of its rows.

The module of such a table is the file of its sweep:

  python -m experiments.sweep --config=experiments/tables/rank.py --workdir=DIR
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.benchmarks import report
from experiments.sweeping import driver, fields, summary, trials
from experiments.sweeping.folder import Folder
from experiments.sweeping.plan import Grid
from experiments.sweeping.trials import Trial
from peftjax.training import workdir

SEEDS = (0, 1, 2)
# The common part of all runs of the classifier: at most 1,024 tokens per step, one subset.
_GRID = {
  "train": {"steps": (250,), "batch_size": (16,), "eval_batch_size": (100,)},
  "data": {
    "max_length": (64,),
    "split_seed": (0,),
    "train_examples": (4000,),
    "eval_examples": (1000,),
  },
}
HEADER = (
  "MiniLM; 250 steps of at most 1,024 tokens on at most 4,000 training examples, scored once on at "
  f"most 1,000 test examples with the parameters best on 1,000 others; {len(SEEDS)} seeds"
)
# The file of the classifier's runs, which tables share.
CLASSIFIER = "trials"

Overrides = dict[str, Any]
Row = dict[str, Any]


def trial(
  data: str, method: str, *, learning_rate: float | None = None, **changes: Any
) -> Overrides:
  """A method of configs/classify.py on a corpus, with fields of `method` that differ from there."""
  rate = {} if learning_rate is None else {"optimizer.learning_rate": learning_rate}
  own = {f"method.{field}": value for field, value in changes.items()}
  return {"base": f"configs/classify.py:method={method},data={data}", **own, **rate}


def sweep(listed: Iterable[Overrides], **grid: Any) -> ConfigDict:
  """Trials in the budget of the classifier's tables, or of another grid, over all seeds."""
  return ConfigDict(dict(trials=tuple(listed), grid={**(grid or _GRID), "seed": SEEDS}))


def by_trial(rows: Sequence[Row]) -> list[list[Row]]:
  """The rows of a sweep's trials in their order, those of each by seed."""
  count = len(rows) // len(SEEDS)  # the seed varies slowest
  return [list(rows[i::count]) for i in range(count)]


def rows(sweep: ConfigDict, file: Path, folder: Path) -> list[Row]:
  """The row of every trial of a sweep, in its order; missing ones are run and added to the file.

  Raises:
    ValueError: a run failed, or is under way in another process.
  """
  if todo := left(sweep, file, folder):
    todo.folder.add(todo.trials())
    driver.work(todo)
    _add(todo, file)
  if todo := left(sweep, file, folder):
    states = summary.counts(summary.states(todo.folder, {one.id: {} for one in todo.trials()}))
    raise ValueError(f"{todo.folder.root}: {states}; run the same command again")
  return [row for row in found(trials.expand(sweep), file) if row]


def left(sweep: ConfigDict, file: Path, folder: Path) -> Grid | None:
  """The part of a sweep that a results file lacks, to be run in a folder; None if it lacks none."""
  listed = trials.expand(sweep)
  missing = [one for one, row in zip(listed, found(listed, file), strict=True) if row is None]
  return Grid(Folder(folder), missing, together=1) if missing else None


def _add(done: Grid, file: Path) -> None:
  """Adds the results of the trials to the file; another process may do the same."""
  listed = done.folder.listed()
  file.parent.mkdir(parents=True, exist_ok=True)
  with done.folder.guard():
    for one, row in zip(done.trials(), found(done.trials(), file), strict=True):
      if row is None:
        for new in summary.rows(done.folder, {one.id: listed[one.id]}):
          workdir.append(file, {**new, "run_commit": new.pop("commit"), **report.origin("tables")})


def found(listed: Sequence[Trial], file: Path) -> list[Row | None]:
  """The row that a results file has for each trial, None where it has none.

  A row is a trial's if its config is the same; a field that is newer than the row has its default.

  Raises:
    ValueError: two rows are of one trial.
  """
  rows = [(where, row, fields.flat(row["config"])) for where, row in workdir.rows(file)]
  default = functools.cache(lambda base: _flat(trials.make({"base": base})))
  made: list[Row | None] = []
  for one in listed:
    now, then = _flat(one), default(one.overrides["base"])
    own = [(where, row) for where, row, config in rows if {**then, **config} == now]
    if own[1:]:
      raise ValueError(f"{own[1][0]} is the run of {own[0][0]} again. Take one of them out.")
    made.append(own[0][1] if own else None)
  return made


def _flat(one: Trial) -> dict[str, Any]:
  return fields.flat(workdir.as_json(one.config))


def accuracy(row: Row) -> float:
  """The accuracy on the test split, in percent."""
  return float(100 * row["metrics"]["test"]["accuracy"])

"""Runs of the classifier that tables share: one budget, one results file, one line a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from configs import classify
from experiments.sweeping import fields
from experiments.sweeping.trials import trial_id
from experiments.tables.cells import Cell
from peftjax.training import workdir as workdirs
from peftjax.training.loop import train_and_evaluate

# Of the file in experiments/results/tables.
RESULTS = "trials"
SEEDS = (0, 1, 2)
# What all runs have in common: 250 steps of at most 1,024 tokens on one subset.
BUDGET = {
  "train.steps": 250,
  "train.batch_size": 16,
  "train.eval_batch_size": 100,
  "data.max_length": 64,
  "data.split_seed": 0,
  "data.train_examples": 4000,
  "data.eval_examples": 1000,
}
HEADER = (
  "MiniLM; 250 steps of at most 1,024 tokens on at most 4,000 training examples, scored once on at "
  f"most 1,000 test examples with the parameters best on 1,000 others; {len(SEEDS)} seeds"
)


class Trial(NamedTuple):
  """A method on a corpus, and what differs from its defaults in configs/classify.py.

  Attributes:
    data, method: of configs/classify.py.
    changes: fields of `method` and their values.
    learning_rate: None for that of configs/classify.py.
  """

  data: str
  method: str
  changes: tuple[tuple[str, Any], ...] = ()
  learning_rate: float | None = None

  @property
  def name(self) -> str:
    rate = () if self.learning_rate is None else (("learning_rate", self.learning_rate),)
    shown = lambda value: ",".join(value) if isinstance(value, tuple) else value
    given = (f"{field}={shown(value)}" for field, value in (*self.changes, *rate))
    return " ".join([self.data, self.method, *given])

  def default(self) -> ConfigDict:
    return classify.get_config(f"method={self.method},data={self.data}")

  def config(self, seed: int) -> ConfigDict:
    config = self.default()
    config.seed = seed
    config.update_from_flattened_dict(BUDGET)
    config.update_from_flattened_dict({f"method.{field}": x for field, x in self.changes})
    if self.learning_rate is not None:
      config.optimizer.learning_rate = self.learning_rate
    return config


def trial(data: str, method: str, *, learning_rate: float | None = None, **changes: Any) -> Trial:
  return Trial(data, method, tuple(changes.items()), learning_rate)


def cells(wanted: Iterable[Trial], folder: Path) -> list[Cell]:
  """A cell for every trial and seed, the seeds one after the other."""
  return [
    Cell(
      f"{one.name} seed={seed}",
      functools.partial(_run, one, seed, folder),
      1.9,
      functools.partial(check, config=one.config(seed), default=one.default()),
    )
    for seed in SEEDS
    for one in dict.fromkeys(wanted)
  ]


def _run(one: Trial, seed: int, folder: Path) -> dict[str, Any]:
  jax.clear_caches()  # the programs of the run before are of no use to this one
  config = one.config(seed)
  workdir = folder / trial_id(config)
  if (workdir / "result.json").exists():  # its line was taken out of the results
    workdirs.clear(workdir)
  result = train_and_evaluate(config, workdir)
  kept = ("trainable_params", "total_params", "metrics", "best_step", "seed", "seconds", "config")
  ranks = {"ranks": result["ranks"]} if "ranks" in result else {}
  return {**{key: result[key] for key in kept}, **ranks, "run_commit": result["commit"]}


def by_trial(
  wanted: Iterable[Trial], rows: list[dict[str, Any]]
) -> dict[Trial, list[dict[str, Any]]]:
  """The rows of each trial, a seed each.

  Raises:
    ValueError: a row is missing, or of another config than its trial's now.
  """
  named = {row["cell"]: row for row in rows}
  found = {}
  for one in dict.fromkeys(wanted):
    cells = [f"{one.name} seed={seed}" for seed in SEEDS]
    if missing := [cell for cell in cells if cell not in named]:
      raise ValueError(f"no result of {missing}; python -m experiments.tables computes it")
    found[one] = [named[cell] for cell in cells]
    for seed, row in zip(SEEDS, found[one], strict=True):
      check(row, one.config(seed), one.default())
  return found


def check(row: Mapping[str, Any], config: ConfigDict, default: ConfigDict) -> None:
  """Compares a row's config with what the table asks for now.

  A row that is older than a field was computed with its default.

  Raises:
    ValueError: they differ.
  """
  now, by_default = (fields.flat(json.loads(x.to_json())) for x in (config, default))
  then = {**by_default, **fields.flat(row["config"])}
  for path, value in then.items():
    if now.get(path) != value:
      raise ValueError(
        f"{row['cell']}: its result was computed with {path}={value!r}, but the table now asks for "
        f"{now.get(path)!r}. Take its line out of the results file to compute it again."
      )

"""Trials that Optuna proposes, one after the other, from the validation scores of others.

The study lies in the sweep's folder. A trial is listed there before it runs, as those of a grid
are; a trial that Optuna takes for running, and nobody runs, lost its worker: it runs again.

  optuna=dict(trials=20, fields=dict(
    optimizer=dict(learning_rate=("log", 1e-4, 1e-2)), method=dict(rank=("choice", 2, 4, 8)))),
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import runpy
from collections.abc import Sequence
from typing import Annotated, Any

from ml_collections import ConfigDict
from msgspec import Meta

from experiments import plots
from experiments.sweeping import trials, worker
from experiments.sweeping.folder import Folder
from experiments.sweeping.trials import Trial
from peftjax.io import records
from peftjax.training import process, resume

_COMPARED = ("method.", "optimizer.")  # searched fields: all others would ask another question


@dataclasses.dataclass(frozen=True)
class Section:
  """The section of a sweep's file: how many trials, and the values of each field, by dotted path.

  Values are `("choice", A, B, ...)`, `("uniform", LOW, HIGH)` or `("log", LOW, HIGH)`; whole
  numbers are drawn between two whole numbers.
  """

  trials: Annotated[int, Meta(ge=1)]
  fields: dict[str, Any]


class Search:
  """A search in a folder, which any number of workers and later runs share."""

  def __init__(self, sweep: ConfigDict, folder: Folder):
    """Checks the section and every end of its ranges; writes nothing.

    Raises:
      ValueError: Optuna is not there, or no trial could be made from the section.
    """
    if importlib.util.find_spec("optuna") is None:
      raise ValueError("a search needs Optuna: pip install 'peftjax[optuna]'")
    given = records.convert(sweep.optuna.to_dict(), Section, "optuna")
    fixed = trials.expand(sweep)
    if len(fixed) != 1:
      raise ValueError(
        f"optuna: a search has one base and one value for every other field, not {len(fixed)} "
        "trials; move the varying fields to optuna.fields"
      )
    if trials.check(sweep).get("together", 1) > 1:
      raise ValueError("optuna: it proposes one trial at a time; leave out together")
    self.folder, self._count = folder, given.trials
    self._fixed = dict(fixed[0].overrides)
    self._make = functools.partial(trials.make, run_path=functools.cache(runpy.run_path))
    self.config = fixed[0].config
    values = resume.flat(given.fields)
    self._space = {path: _distribution(path, values[path]) for path in values}
    if not values:
      raise ValueError("optuna: fields is empty; give it one: optimizer.learning_rate")
    for path, ends in values.items():
      if path in self._fixed:
        raise ValueError(f"{path}: both in optuna.fields and in the grid or list; leave one out")
      for end in ends[1:]:
        self._make({**self._fixed, **{p: x[1] for p, x in values.items()}, path: end})

  @property
  def more(self) -> str:
    return f" of {self._count} that Optuna proposes"

  def trials(self) -> Sequence[Trial]:
    if not self._path.exists():
      return []
    return [self._trial(one) for one in self._proposed(self._study())]

  def work(self, watcher: worker.Watcher) -> None:
    """Runs the rest of the proposed trials, and proposes more, until there are enough."""
    study = self._study()
    with process.interrupts():
      while True:
        proposed = self._proposed(study)
        todo = [self._trial(one) for one in proposed]
        if todo:
          self.folder.add(todo)
        worker.work(todo, self.folder, watcher)
        self._tell(study)
        with self.folder.guard():
          if len(self._proposed(study)) >= self._count:
            return
          study.sampler = _sampler(seed=len(study.trials))
          study.ask(self._space)

  def left(self) -> bool:
    known = self.trials()
    return len(known) < self._count or any(self.folder.waits(one.id) for one in known)

  @property
  def _path(self) -> Any:
    return self.folder.root / "optuna.log"

  def _study(self) -> Any:
    """The study in the folder; begins one if there is none.

    Raises:
      ValueError: it searches other values.
    """
    import optuna
    from optuna.storages import journal

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self.folder.root.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(self._path)))
    with self.folder.guard():
      study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
      )
    for one in study.trials:
      known = one.distributions if one.state.is_finished() else {**self._space, **one.distributions}
      if known != self._space:
        raise ValueError(
          f"{self._path} searches {_shown(known)}, and not {_shown(self._space)}: give another "
          "--workdir"
        )
    return study

  def _proposed(self, study: Any) -> list[Any]:
    """Optuna's trials, less one whose worker was killed while it was drawn."""
    return [one for one in study.trials if len(one.params) == len(self._space)]

  def _trial(self, one: Any) -> Trial:
    return self._make({**self._fixed, **one.params})

  def _tell(self, study: Any) -> None:
    """Tells Optuna of every trial that has ended since; more is better."""
    import optuna

    for one in self._proposed(study):
      if one.state.is_finished():
        continue
      name = self._trial(one).id
      if result := self.folder.result(name):
        metric, value = plots.metric(result, "validation")
        value = -value if metric in plots.DOWN else value
        study.tell(one.number, value, skip_if_finished=True)
      elif self.folder.error(name):
        study.tell(one.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _distribution(path: str, values: Any) -> Any:
  """Optuna's distribution of a field's values."""
  from optuna import distributions as all_of

  if not path.startswith(_COMPARED):
    raise ValueError(
      f"optuna: {path} is no field of method or optimizer; results that differ in it do not compare"
    )
  kind, *ends = values if isinstance(values, tuple | list) else (values,)
  number = len(ends) == 2 and all(type(x) in (int, float) for x in ends) and ends[0] < ends[-1]
  if kind == "choice" and ends and all(isinstance(x, str | int | float | None) for x in ends):
    return all_of.CategoricalDistribution(ends)
  if kind in ("uniform", "log") and number and not (kind == "log" and ends[0] <= 0):
    whole = all(type(x) is int for x in ends)
    made = all_of.IntDistribution if whole else all_of.FloatDistribution
    return made(*ends, log=kind == "log")
  raise ValueError(
    f"optuna: {path} is {records.clip(values)}; write ('choice', A, B), ('uniform', LOW, HIGH) or, "
    "above 0, ('log', LOW, HIGH)"
  )


def _sampler(seed: int) -> Any:
  """Tree-structured Parzen estimator (Bergstra et al., 2011); one seed per trial, so that no two
  workers draw the same."""
  import optuna

  return optuna.samplers.TPESampler(seed=seed)


def _shown(space: Any) -> str:
  return ", ".join(f"{path} {x}" for path, x in sorted(space.items()))

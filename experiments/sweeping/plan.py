"""The plan of a sweep: trials that are all known beforehand, or ones that Optuna proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ml_collections import ConfigDict

from experiments.sweeping import search, trials, worker
from experiments.sweeping.folder import Folder
from experiments.sweeping.trials import Trial


class Plan(Protocol):
  """Trials to run; every worker on a folder has a plan of its own, made from the same file."""

  @property
  def folder(self) -> Folder:
    """The folder of the trials and their claims."""

  @property
  def config(self) -> ConfigDict:
    """The config of a run, for the fields that no trial varies."""

  @property
  def more(self) -> str:
    """A text for people about trials that will be added to those known now."""

  def trials(self) -> Sequence[Trial]:
    """The trials that are known now."""

  def work(self, watcher: worker.Watcher) -> None:
    """Runs the rest; raises as `worker.work` does."""

  def left(self) -> bool:
    """Tells whether there is a trial that nobody runs."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """A plan from the bases, the list and the grid of a sweep's file."""

  folder: Folder
  all: Sequence[Trial]
  together: int
  more: str = ""

  @property
  def config(self) -> ConfigDict:
    return self.all[0].config

  def trials(self) -> Sequence[Trial]:
    return self.all

  def work(self, watcher: worker.Watcher) -> None:
    worker.work(self.all, self.folder, watcher, together=self.together)

  def left(self) -> bool:
    return any(self.folder.waits(trial.id) for trial in self.all)


def of(sweep: ConfigDict, folder: Folder) -> Plan:
  """The plan of a sweep's config; raises ValueError as `trials.expand` does."""
  given = trials.check(sweep)
  if given.get("optuna"):
    return search.Search(sweep, folder)
  return Grid(folder, trials.expand(sweep), given.get("together", 1))

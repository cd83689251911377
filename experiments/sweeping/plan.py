"""What a sweep asks for: trials that are all known beforehand, or ones that Optuna proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ml_collections import ConfigDict

from experiments.sweeping import search, trials, worker
from experiments.sweeping.folder import Folder
from experiments.sweeping.trials import Trial


class Plan(Protocol):
  """Every worker on a folder has one of its own, made from the same file."""

  @property
  def folder(self) -> Folder:
    """Where the trials and their claims are."""

  @property
  def config(self) -> ConfigDict:
    """Of a run, for the fields that no trial varies."""

  @property
  def more(self) -> str:
    """For people: what will be added to the trials that are known now."""

  def trials(self) -> Sequence[Trial]:
    """Those that are known now."""

  def work(self, watcher: worker.Watcher) -> None:
    """Runs what is left; raises as `worker.work` does."""

  def left(self) -> bool:
    """Whether there is something that nobody runs."""


@dataclasses.dataclass(frozen=True)
class Grid:
  """The bases, the list and the grid of a sweep's file."""

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

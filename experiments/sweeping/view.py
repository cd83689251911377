"""The display of a running sweep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich
from rich.live import Live
from rich.table import Table

from experiments.sweeping import summary
from experiments.sweeping.folder import Folder
from experiments.sweeping.trials import Trial

_AROUND = 11  # lines of a screen for the frame of the table and the bar of the trial below it


class View:
  """A table that follows the folder, or one line per event where there is no terminal.

  The bar of the trial that runs appears below the table: both are on rich's own console, which
  nests live displays.
  """

  def __init__(self, folder: Folder):
    self._folder = folder
    self._console = rich.get_console()
    self._mine: set[str] = set()
    self._read = -1.0  # when the folder was read last
    self._states: Mapping[str, Mapping[str, Any]] = {}
    self._told: set[str] | None = None  # trials whose end has been told
    self._table = Table()
    self._live = Live(
      get_renderable=self._show,
      console=self._console,
      refresh_per_second=1,
      transient=True,
      redirect_stdout=False,
      redirect_stderr=False,
    )

  def begins(self, trials: Sequence[Trial]) -> None:
    self._mine, self._read = {trial.id for trial in trials}, -1.0
    counts = summary.counts(self._look())
    self.says(f"\n{', '.join(trial.id for trial in trials)}: running ({counts})")

  def apart(self, trials: Sequence[Trial], error: Exception) -> None:
    """Tells that trials could not be trained together."""
    self.says(f"one by one, for together: {type(error).__name__}: {error}")

  def ends(self, trials: Sequence[Trial]) -> None:
    self._mine, self._read = set(), -1.0
    for trial in trials:
      self._end(trial.id)

  def follows(self) -> None:
    """Tells an onlooker a line for every trial that has ended since the last time."""
    self._read = -1.0
    ended = {name for name, x in self._look().items() if x["status"] in ("done", "failed")}
    for name in sorted(ended - (ended if self._told is None else self._told)):
      self._end(name)
    self._told = ended

  def _end(self, name: str) -> None:
    state = self._look()[name]
    self.says(f"{name}: {state['status']}, {state.get('metric', '')} {state.get('value', '')}")

  def says(self, text: str) -> None:
    self._console.print(text, highlight=False, markup=False, soft_wrap=True)

  def _look(self) -> Mapping[str, Mapping[str, Any]]:
    """The state of the trials, at most a second ago: a bar asks ten times as often."""
    if time.monotonic() - self._read > 1:
      listed = self._folder.listed()
      self._states = summary.states(self._folder, listed, self._mine)
      height = max(self._console.size.height - _AROUND, 3)
      self._table = summary.table(listed, self._states, height)
      self._read = time.monotonic()
    return self._states

  def _show(self) -> Table:
    self._look()
    return self._table

  def __enter__(self) -> View:
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._live.stop()

"""The work of a worker: claims a trial, runs it, takes the next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax

from experiments.sweeping.folder import Folder
from experiments.sweeping.trials import Trial
from peftjax.io import disk
from peftjax.training import lock, loop, process
from peftjax.training.together import group_of, train_together


class Watcher(Protocol):
  """Hears of events here."""

  def begins(self, trials: Sequence[Trial]) -> None: ...
  def apart(self, trials: Sequence[Trial], error: Exception) -> None: ...
  def ends(self, trials: Sequence[Trial]) -> None: ...


def run(trial: Trial, workdir: Path) -> None:
  """Trains one trial, or goes on with it, until `workdir/result.json` is there."""
  jax.clear_caches()  # the programs of the trial before are of no use to this one
  loop.train_and_evaluate(trial.config, workdir)


def work(
  trials: Sequence[Trial],
  folder: Folder,
  watcher: Watcher,
  run: Callable[[Trial, Path], None] = run,
  together: int = 1,
) -> None:
  """Runs the trials that have not ended and that nobody else runs, until a pass finds none.

  Up to `together` trials that `training.together` can train in one step are run as one. An
  exception of a trial is recorded, and the rest go on.

  Raises:
    loop.Stopped: after SIGTERM, SIGHUP or Ctrl-C; the trial that was training has saved.
    KeyboardInterrupt: after a signal that came at another moment.
    disk.DiskError: a file that no other trial could write either, as on a full disk.
    lock.Held: another command runs in a trial's folder.
  """
  with process.interrupts() as asked:
    left, found = list(trials), True
    while found:
      found = False
      for trial in tuple(left):
        with contextlib.ExitStack() as claims:
          mine = _claimed(trial, left, folder, together, claims)
          if mine:
            found = True
            for one in mine:
              left.remove(one)  # once is enough, whatever it leaves behind
            watcher.begins(mine)
            _run(mine, folder, watcher, run)
            watcher.ends(mine)
            if asked():
              raise KeyboardInterrupt


def _claimed(
  trial: Trial, left: Sequence[Trial], folder: Folder, most: int, claims: contextlib.ExitStack
) -> list[Trial]:
  """The trial and others of its group, as far as they are to be run and nobody else runs them."""
  key = lambda one: group_of(json.loads(one.config.to_json()))
  group = [one for one in left if one is trial or (most > 1 and key(one) == key(trial))]
  mine: list[Trial] = []
  for one in group if trial in left else ():
    if len(mine) < most and not folder.ended(one.id):
      if claims.enter_context(folder.claim(one.id)) and not folder.ended(one.id):
        mine.append(one)
  return mine


def _run(
  trials: Sequence[Trial], folder: Folder, watcher: Watcher, run: Callable[[Trial, Path], None]
) -> None:
  if len(trials) > 1:
    jax.clear_caches()
    paths = [folder.trial(one.id) for one in trials]
    try:
      results = train_together([one.config for one in trials], paths)
    except Exception as error:  # not together, then; alone each one says what is wrong with it
      _end_all(error)
      watcher.apart(trials, error)
      trials = [one for one in trials if not folder.ended(one.id)]
    else:
      for one, result in zip(trials, results, strict=True):
        if isinstance(result, Exception):
          folder.fail(one.id, result)
      return
  for trial in trials:
    try:
      run(trial, folder.trial(trial.id))
    except Exception as error:
      _end_all(error)
      folder.fail(trial.id, error)


def _end_all(error: Exception) -> None:
  """Raises an error that is no fault of a trial: no other could go on, or it runs elsewhere."""
  full = isinstance(error, disk.DiskError) and error.everywhere
  if full or isinstance(error, loop.Stopped | lock.Held):
    raise error

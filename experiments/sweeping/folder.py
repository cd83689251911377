"""The folder of a sweep: its trials, the state of each, and who runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.sweeping import fields
from experiments.sweeping.trials import Trial
from peftjax.io import records
from peftjax.training import process, resume, workdir
from peftjax.training.logs import write_atomic

_RESTORE = "Put it back from a copy, or give another --workdir."
_FORGET = "Remove it: the trial then runs again."


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A trial in `sweep.json`."""

  overrides: dict[str, Any]
  config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Listing:
  """All of `sweep.json`, by id."""

  trials: dict[str, _Entry]


@dataclasses.dataclass(frozen=True)
class _Failure:
  """The contents of `error.json`."""

  type: str
  message: str
  traceback: str
  commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Folder:
  """`root/sweep.json` lists the trials, `root/trials/ID` is the workdir of one.

  A trial is claimed by an operating system's lock on `root/trials/ID.lock`, so the claim of a
  worker that is killed ends with it. `root/sweep.lock` is held for moments.
  """

  root: Path

  def trial(self, name: str) -> Path:
    return self.root / "trials" / name

  def listed(self) -> dict[str, dict[str, Any]]:
    """Overrides and config of every trial of this folder, by id."""
    path = self.root / "sweep.json"
    if not path.exists():
      return {}
    found = records.read_object(path, _RESTORE)
    try:
      records.convert({"trials": found}, _Listing, path)
    except ValueError as error:
      raise ValueError(f"{error} {_RESTORE}") from None
    return found

  def check(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The listed trials with these added; nothing is written.

    Raises:
      ValueError: if what all earlier trials share (data, model, steps) is not what these share, or
        the folder of a trial holds a run of another config.
    """
    before = self.listed()
    new = {x.id: json.loads(json.dumps(_entry(x))) for x in trials}
    if before and new:
      there, now = (_shared([x["config"] for x in part.values()]) for part in (before, new))
      differ = [k for k in there.keys() & now.keys() if there[k] != now[k]]
      if differ:
        rows = "\n".join(f"  {k}: {there[k]!r} there, {now[k]!r} now" for k in sorted(differ))
        raise ValueError(
          f"{self.root} holds a sweep whose results do not compare with this one's:\n{rows}\n"
          "Give the same values to add trials to it, or another --workdir."
        )
    for name, entry in new.items():
      try:
        resume.check_config(self.trial(name) / "config.json", entry["config"])
      except ValueError as error:
        raise ValueError(f"{error}\nOr remove that folder: the trial then runs anew.") from None
    return {**before, **new}

  def add(self, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Lists these trials too; returns all."""
    (self.root / "trials").mkdir(parents=True, exist_ok=True)
    with self.guard():
      listed = self.check(trials)
      write_atomic(self.root / "sweep.json", json.dumps(listed, indent=1) + "\n")
    return listed

  def guard(self) -> FileLock:
    """A lock for writing to files that workers share, and for asking who runs."""
    return FileLock(self.root / "sweep.lock")

  @contextlib.contextmanager
  def claim(self, name: str) -> Iterator[bool]:
    """Claims a trial, and tells if this process may run it; if so, nobody else may meanwhile."""
    lock = FileLock(self.root / "trials" / f"{name}.lock", blocking=False)
    with contextlib.ExitStack() as stack:
      with self.guard():  # so that `running`, which tries the same lock, is not in the way
        with contextlib.suppress(Timeout):
          stack.enter_context(lock)
      yield lock.is_locked

  def running(self, name: str) -> bool:
    """Tells whether some process has claimed the trial."""
    if not (self.root / "trials" / f"{name}.lock").exists():
      return False
    with self.guard():
      try:
        with FileLock(self.root / "trials" / f"{name}.lock", blocking=False):
          return False
      except Timeout:
        return True

  def result(self, name: str) -> dict[str, Any] | None:
    return workdir.result(self.trial(name) / "result.json")

  def error(self, name: str) -> dict[str, Any] | None:
    return workdir.record(self.trial(name) / "error.json", _Failure, _FORGET)

  def ended(self, name: str) -> bool:
    """Tells whether the trial is done or has failed."""
    return self.result(name) is not None or self.error(name) is not None

  def waits(self, name: str) -> bool:
    """Tells whether the trial has not ended, and nobody runs it."""
    return not self.ended(name) and not self.running(name)

  def fail(self, name: str, error: Exception) -> None:
    """Records the error that ended the trial; its checkpoints stay."""
    self.trial(name).mkdir(parents=True, exist_ok=True)
    record = {
      "type": type(error).__name__,
      "message": str(error),
      "traceback": "".join(traceback.format_exception(error)),
      "commit": process.commit(),
    }
    write_atomic(self.trial(name) / "error.json", json.dumps(record, indent=2) + "\n")

  def forget_failures(self, trials: Sequence[Trial]) -> None:
    """Makes failed trials wait again."""
    for trial in trials:
      (self.trial(trial.id) / "error.json").unlink(missing_ok=True)


def _entry(trial: Trial) -> dict[str, Any]:
  return {"overrides": dict(trial.overrides), "config": json.loads(trial.config.to_json())}


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The fields, of those that trials have to agree in, that have one value in all of them."""
  flat = [fields.question(fields.flat(config)) for config in configs]
  apart = set(fields.varying(flat))
  return {path: value for path, value in flat[0].items() if path not in apart}

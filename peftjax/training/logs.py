"""Logs of a run for people: `metrics.jsonl`, TensorBoard events, a progress bar."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rich
import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftjax.io import disk
from peftjax.training import workdir as workdirs

# Fields that depend on the clock or the allocator and so differ between equal runs.
TIME_FIELDS = (
  *("examples_per_second", "tokens_per_second", "flops_per_second", "share_of_peak"),
  *("bytes_in_use", "peak_bytes_in_use", "seconds"),
)


class Logs:
  """Writes rows of numbers by step to `metrics.jsonl` and TensorBoard.

  On resuming at a step, rows after it are cut and the events are written anew from what is left,
  so an interrupted run's logs are those of an uninterrupted one. `dropped` are the rows that were
  cut.
  """

  def __init__(self, workdir: Path, step: int):
    path = workdir / "metrics.jsonl"
    found = list(zip(workdirs.lines(path), workdirs.metrics(path), strict=True))
    self._kept = [row for _, row in found if row["step"] <= step]
    self.dropped = len(found) - len(self._kept)
    text = "".join(line for line, row in found if row["step"] <= step)
    write_atomic(path, text)
    self._rows, self._digest = len(self._kept), hashlib.sha256(text.encode())
    self._file = path.open("a", encoding="utf-8")
    self._directory = workdir / "tensorboard"

  def write(self, row: dict[str, Any]) -> None:
    """Writes one row, with "step"; it is in the file when this returns."""
    line = json.dumps(row) + "\n"
    self._file.write(line)
    self._file.flush()
    self._rows += 1
    self._digest.update(line.encode())
    self._emit(self._events, row)

  def mark(self) -> dict[str, Any]:
    """A checkpoint's record of the rows so far (see `workdir.Log`), which are on the disk then."""
    os.fsync(self._file.fileno())
    return {"rows": self._rows, "sha256": self._digest.hexdigest()}

  @functools.cached_property
  def _events(self) -> Any:
    """The events' writer, made at the first row: tensorboardX imports torch if it is there."""
    from tensorboardX import SummaryWriter

    workdirs.clear_events(self._directory)
    events = SummaryWriter(str(self._directory))
    for row in self._kept:
      self._emit(events, row)
    return events

  @staticmethod
  def _emit(events: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
      if name not in ("step", "epoch"):
        events.add_scalar(name, value, row["step"])

  def close(self) -> None:
    self._file.close()
    if "_events" in self.__dict__:
      self._events.close()


class Silent:
  """The `Logs` of a process that does not write."""

  dropped = 0

  def write(self, row: dict[str, Any]) -> None:
    pass

  def mark(self) -> dict[str, Any]:
    return {}

  def close(self) -> None:
    pass


def write_atomic(path: Path, text: str) -> None:
  """Writes a whole file or, if killed or refused, nothing.

  Raises:
    disk.DiskError: it cannot be written.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with temporary.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise disk.refusal(error, path) from None


def write_json(path: Path, value: Any) -> None:
  """Writes an object as JSON, likewise, indented for people."""
  write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _is_notebook(console: rich.console.Console) -> bool:
  """Tells whether a console can show moving parts: in notebooks rich needs ipywidgets for it."""
  return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class Bar:
  """A progress bar with loss, examples/s and time left; plain lines where there is no terminal
  and no notebook.

  A terminal that is closed while the run goes on is no reason to lose the run. If several processes
  share a run, one has it `shown`.
  """

  def __init__(self, name: str, start: int, total: int, *, shown: bool = True):
    # rich's own, so that it nests in the live table of a sweep.
    self.console = rich.get_console() if shown else rich.console.Console(quiet=True)
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      console=self.console,
      disable=not (self.console.is_terminal or _is_notebook(self.console)),
    )
    self._task = self._bar.add_task(name, total=total, completed=start, numbers="compiling")

  def update(self, step: int, loss: float, rate: float) -> None:
    numbers = f"loss {loss:.4f}  {rate:,.0f} examples/s"
    self._shown(lambda: self._bar.update(self._task, completed=step, numbers=numbers))

  def scores(self, name: str, scores: Mapping[str, float]) -> None:
    self.print(f"{name:<14}" + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))

  def print(self, text: str) -> None:
    self._shown(lambda: self.console.print(text, highlight=False, soft_wrap=True))

  @staticmethod
  def _shown(show: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
      show()

  def __enter__(self) -> Bar:
    self._shown(self._bar.start)
    return self

  def __exit__(self, *error: object) -> None:
    self._shown(self._bar.stop)

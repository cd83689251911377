"""What a person reads of a run: `metrics.jsonl`, TensorBoard events, a progress bar."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import rich
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Fields that depend on the clock and so differ between equal runs.
TIME_FIELDS = ("examples_per_second", "seconds")


class Logs:
  """Rows of numbers by step, to `metrics.jsonl` and TensorBoard.

  On resuming at a step, rows after it are cut and the events are written anew from what is left,
  so an interrupted run's logs are those of an uninterrupted one.
  """

  def __init__(self, workdir: Path, step: int):
    path = workdir / "metrics.jsonl"
    self._kept = [row for row in _read(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in self._kept))
    self._file = path.open("a", encoding="utf-8")
    self._directory = workdir / "tensorboard"

  def write(self, row: dict[str, Any]) -> None:
    """One row, with "step"; in the file when this returns."""
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    self._emit(self._events, row)

  @functools.cached_property
  def _events(self) -> Any:
    """Made at the first row: tensorboardX imports torch if it is there, which takes seconds."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(self._directory, ignore_errors=True)
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


def _read(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break  # the line that a kill cut short, and nothing can follow it
  return rows


def write_atomic(path: Path, text: str) -> None:
  """Writes a whole file or, if killed, nothing."""
  temporary = path.with_name(f".{path.name}.tmp")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


class Bar:
  """A progress bar with loss, examples/s and time left; plain lines where there is no terminal."""

  def __init__(self, name: str, start: int, total: int):
    self.console = rich.get_console()  # so that it nests in the live table of a sweep
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._task = self._bar.add_task(name, total=total, completed=start, numbers="compiling")

  def update(self, step: int, loss: float, rate: float) -> None:
    self._bar.update(self._task, completed=step, numbers=f"loss {loss:.4f}  {rate:,.0f} examples/s")

  def scores(self, name: str, scores: Mapping[str, float]) -> None:
    self.print(f"{name:<14}" + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))

  def print(self, text: str) -> None:
    self.console.print(text, highlight=False, soft_wrap=True)

  def __enter__(self) -> Bar:
    self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.stop()

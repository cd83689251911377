"""Cells of a table: computed once each, kept as lines of a results file."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from experiments.benchmarks import report
from peftjax.training import process, workdir

_ADVICE = "Take the line out to compute it again."


class Cell(NamedTuple):
  """One number of a table, and what belongs to it.

  Attributes:
    name: of its line.
    run: computes it: fields of a row.
    minutes: what it takes on two CPU cores, roughly.
    check: raises ValueError for a row that was computed otherwise.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  minutes: float
  check: Callable[[Mapping[str, Any]], None] = lambda row: None


def left(cells: list[Cell], results: Path) -> list[Cell]:
  """Those that the results do not have yet.

  Raises:
    ValueError: a row that they have was computed otherwise than it would be now.
  """
  done = rows(results)
  for cell in cells:
    if cell.name in done:
      cell.check(done[cell.name])
  return [cell for cell in cells if cell.name not in done]


def show_left(table: str, cells: list[Cell], results: Path) -> None:
  missing, console = left(cells, results), Console()
  for cell in missing:
    console.print(f"  {cell.name}  {cell.minutes:.1f} min", highlight=False)
  console.print(f"{table}: {len(missing)} of {len(cells)} cells left, about {hours(missing)} hours")


def hours(cells: list[Cell]) -> str:
  return f"{sum(cell.minutes for cell in cells) / 60:.1f}"


def compute(
  cells: list[Cell], results: Path, asked: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
  """The rows of all cells; what is not in the results is computed and added to them at once.

  Several processes may do so at the same time: each takes cells that no other one is at.

  Raises:
    KeyboardInterrupt: after a cell, if it was `asked` for while that one ended.
  """
  results.with_suffix(".locks").mkdir(parents=True, exist_ok=True)
  todo, elsewhere = left(cells, results), []
  for cell in track(todo, "cells") if todo else ():
    try:
      _add(cell, results, timeout=0)
    except Timeout:
      elsewhere.append(cell)
    if asked():
      raise KeyboardInterrupt
  for cell in elsewhere:  # computed by now, or given up
    _add(cell, results, timeout=-1)
  done = rows(results)
  return [done[cell.name] for cell in cells]


def _add(cell: Cell, results: Path, timeout: float) -> None:
  """Computes a cell unless its row is there by now; `Timeout` if another process is at it."""
  locks = results.with_suffix(".locks")
  with FileLock(locks / hashlib.sha256(cell.name.encode()).hexdigest(), timeout=timeout):
    if cell.name in rows(results):
      return
    row = {
      "cell": cell.name,
      **cell.run(),
      "command": shlex.join(["python", "-m", "experiments.tables", *sys.argv[1:]]),
      "commit": process.commit(),
      "machine": report.machine(),
      "versions": report.versions(),
    }
    with FileLock(locks / "file"):
      workdir.append(results, row)


def rows(results: Path) -> dict[str, dict[str, Any]]:
  """The lines of a results file by cell.

  Raises:
    ValueError: naming a line that is damaged, or that another has the cell of.
  """
  found: dict[str, dict[str, Any]] = {}
  for where, row in workdir.rows(results, _ADVICE):
    name = row.get("cell")
    if not isinstance(name, str) or name in found:
      what = f"has the cell {name!r} again" if isinstance(name, str) else "names no cell"
      raise ValueError(f"{where} {what}. {_ADVICE}")
    found[name] = row
  return found

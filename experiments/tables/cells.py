"""Cells of a table that are not runs: computed in order, each a line of a results file at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from rich.progress import track

from experiments.benchmarks import report
from peftjax.training import workdir

_ADVICE = "Take the line out to compute it again."


class Cell(NamedTuple):
  """One number of a table, and its computation.

  Attributes:
    name: name of its line.
    run: computes it: fields of a row.
    check: raises ValueError for a row that was computed otherwise.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  check: Callable[[Mapping[str, Any]], None] = lambda row: None


def left(cells: list[Cell], results: Path) -> list[Cell]:
  """The cells that the results do not have yet.

  Raises:
    ValueError: a row that they have was computed otherwise than it would be now.
  """
  done = rows(results)
  for cell in cells:
    if cell.name in done:
      cell.check(done[cell.name])
  return [cell for cell in cells if cell.name not in done]


def compute(cells: list[Cell], results: Path) -> list[dict[str, Any]]:
  """The rows of all cells; missing ones are computed and added to the results at once."""
  results.parent.mkdir(parents=True, exist_ok=True)
  if left(cells, results):
    with FileLock(results.with_suffix(".lock")):  # another process may be at them
      for cell in track(left(cells, results), "cells"):
        workdir.append(results, {"cell": cell.name, **cell.run(), **report.origin("tables")})
  done = rows(results)
  return [done[cell.name] for cell in cells]


def rows(results: Path) -> dict[str, dict[str, Any]]:
  """The lines of a results file by cell.

  Raises:
    ValueError: naming a line that is damaged, or that repeats another's cell.
  """
  found: dict[str, dict[str, Any]] = {}
  for where, row in workdir.rows(results, _ADVICE):
    name = row.get("cell")
    if not isinstance(name, str) or name in found:
      what = f"has the cell {name!r} again" if isinstance(name, str) else "names no cell"
      raise ValueError(f"{where} {what}. {_ADVICE}")
    found[name] = row
  return found

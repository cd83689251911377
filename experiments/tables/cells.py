"""Cells of a table: computed once each, kept in files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from experiments.benchmarks import report
from peftjax.training import process
from peftjax.training.logs import write_atomic


class Cell(NamedTuple):
  """One number of a table, and what belongs to it.

  Attributes:
    name: of its file.
    run: computes it: fields of a row.
    minutes: what it takes on two CPU cores, roughly.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  minutes: float


def show_left(table: str, cells: list[Cell], folder: Path) -> None:
  left = [cell for cell in cells if not _file(folder, cell).exists()]
  console = Console()
  for cell in left:
    console.print(f"  {cell.name}  {cell.minutes:.1f} min", highlight=False)
  hours = sum(cell.minutes for cell in left) / 60
  console.print(f"{table}: {len(left)} of {len(cells)} cells left, about {hours:.1f} hours")


def compute(cells: list[Cell], folder: Path) -> list[dict[str, Any]]:
  """The rows of all cells; those whose file is there are read."""
  folder.mkdir(parents=True, exist_ok=True)
  for cell in track(cells, "cells"):
    if not _file(folder, cell).exists():
      row = {"cell": cell.name, **cell.run(), "commit": process.commit()}
      write_atomic(_file(folder, cell), json.dumps(row) + "\n")
  return [json.loads(_file(folder, cell).read_text()) for cell in cells]


def write(path: str, rows: list[dict[str, Any]]) -> None:
  """One JSON line a row, with command, machine and versions."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  common = {
    "command": shlex.join(["python", "-m", "experiments.tables", *sys.argv[1:]]),
    "machine": report.machine(),
    "versions": report.versions(),
  }
  write_atomic(Path(path), "".join(json.dumps({**row, **common}) + "\n" for row in rows))


def _file(folder: Path, cell: Cell) -> Path:
  return folder / f"{cell.name}.json"

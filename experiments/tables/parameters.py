"""The papers' columns of trained parameters, counted again on models of shapes alone.

A row is a number that a paper prints, and the count of `attach` and `count` for its model and
method. The printed number is `exact` (every digit), or our count `rounds` to it, or begins with it
(`cut`: digits were cut off). Any other is a `misprint`, a `nominal` size, a number that depends
on where ranks were `learned`, or `unexplained`. Heads of tasks are trained but not counted, as in
the papers. A share is that of the model's own parameters unless the row says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.tables.cells import Cell
from experiments.tables.printed_counts import ROWS
from experiments.tables.report import Report

RESULTS = "parameters"


def cells(folder: Path) -> list[Cell]:
  return [Cell(row.cell, row.run) for row in ROWS]


def table(rows: list[dict[str, Any]]) -> Report:
  """The report: all rows, and below them remarks on some, by number."""
  notes: list[str] = []
  lines = []
  for row in rows:
    mark = ""
    if text := _note(row):
      if text not in notes:
        notes.append(text)
      mark = str(notes.index(text) + 1)
    names = (row["source"], row["model"], row["method"], row["printed"], f"{row['count']:,}")
    lines.append([*names, row["ours"], row["verdict"], mark])
  return Report(
    "Trained parameters: the papers' numbers, and those of models of shapes alone.",
    ("source", "model", "method", "printed", "count", "ours", "verdict", "note"),
    lines,
    [f"{i}: {text}." for i, text in enumerate(notes, 1)],
  )


def _note(row: dict[str, Any]) -> str:
  meant = row["meant"]
  if meant is None or not meant["verdict"]:
    return str(row["note"])
  return f"{row['printed']} is {meant['name']}: {meant['count']:,}"

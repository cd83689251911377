"""A finished table, and its forms: for a terminal, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

FORMATS = ("terminal", "markdown", "latex", "csv")


class Report(NamedTuple):
  """A title, named columns, lines of as many texts, and notes on them."""

  title: str
  columns: Sequence[str]
  lines: Sequence[Sequence[str]]
  notes: Sequence[str] = ()


def write(report: Report, form: str) -> None:
  """Writes to standard output."""
  if form == "csv":
    print("".join(f"# {text}\n" for text in (report.title, *report.notes)), end="")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows([report.columns, *report.lines])
  elif form == "latex":
    print(_latex(report))
  else:
    _rich(report, markdown=form == "markdown")


def mean(values: Sequence[float], form: str = ".2f") -> str:
  """Mean ± sample standard deviation, as a text."""
  spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
  return f"{statistics.mean(values):{form}}{spread}"


def _rich(report: Report, markdown: bool) -> None:
  table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
  for i, column in enumerate(report.columns):
    table.add_column(column, justify="right" if i else "left", no_wrap=True)
  for line in report.lines:
    table.add_row(*line)
  # A line is never cut: where the terminal is too narrow it breaks there.
  wide = Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum
  console = Console(width=max(wide, Console().width), highlight=False)
  console.print(report.title, soft_wrap=True)
  console.print(table)
  for note in report.notes:
    console.print(note, soft_wrap=True)


def _latex(report: Report) -> str:
  escape = lambda text: text.replace("&", r"\&").replace("%", r"\%").replace("_", r"\_")
  row = lambda cells: " & ".join(escape(x).replace("±", r"$\pm$") for x in cells) + r" \\"
  lines = [
    *(f"% {text}" for text in (report.title, *report.notes)),
    rf"\begin{{tabular}}{{l{'r' * (len(report.columns) - 1)}}}",
    r"\toprule",
    row(report.columns),
    r"\midrule",
    *map(row, report.lines),
    r"\bottomrule",
    r"\end{tabular}",
  ]
  return "\n".join(lines)

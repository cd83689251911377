"""Measures the claims of the text this project started from, one row per statement.

  python -m experiments.claims
  python -m experiments.claims --only='lora|adapters.*latency'

The verdict of each is computed from its numbers and compared with the one that it had before. Exit
code 1 if one changed or could not be measured. Five minutes on two quiet CPU cores. --results=FILE
writes a line per claim in place of that claim's old one, and leaves lines of those that were not
measured: experiments/results/claims/claims.jsonl holds those of the last time.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from experiments import runtime

if TYPE_CHECKING:
  from experiments.claims.claim import Claim

ONLY = flags.DEFINE_string("only", "", "Measure the claims whose name this regex is found in.")
RESULTS = flags.DEFINE_string("results", "", "Write the rows to this file, JSON lines.")


@runtime.readable_errors()
def main(argv: list[str]) -> None:
  runtime.set_up("~/.cache/peftjax")
  rows = measure(chosen(ONLY.value))
  if RESULTS.value:
    write(rows, RESULTS.value)
  if not show(rows):
    sys.exit(1)


def chosen(only: str) -> list["Claim"]:
  """The claims that a regex picks, by name.

  Raises:
    ValueError: if it picks none, or is not a regex.
  """
  from experiments.claims import catalogue

  try:
    found = [claim for claim in catalogue.CLAIMS if re.search(only, claim.name)]
  except re.error as error:
    raise ValueError(f"--only={only!r} is not a regular expression: {error}") from None
  if not found:
    names = ", ".join(claim.name for claim in catalogue.CLAIMS)
    raise ValueError(f"--only={only!r} is found in no name. There are: {names}")
  return found


def measure(claims: Sequence["Claim"]) -> list[dict[str, Any]]:
  """One row per claim; one that raises has an "error" and no verdict, and the rest go on."""
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

  columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn())
  rows = []
  with Progress(*columns, TimeElapsedColumn()) as bar:
    task = bar.add_task("", total=len(claims))
    for claim in claims:
      bar.update(task, description=claim.name)
      row = {key: getattr(claim, key) for key in ("name", "says", "measured_by", "holds_if")}
      begun = time.perf_counter()
      try:
        finding = claim.run()
        row.update(
          numbers=dict(finding.numbers), verdict=finding.verdict, correction=finding.correction
        )
      except Exception as error:  # whatever it is, the other claims are measured
        row.update(numbers={}, verdict=None, error=f"{type(error).__name__}: {error}")
      row.update(expected=claim.expected, seconds=round(time.perf_counter() - begun, 1))
      rows.append(row)
      sign = "[red]CHANGED[/red] " if changed(row) else ""
      bar.console.print(
        f"{sign}{claim.name}: {row['verdict']}, {row['seconds']} s", highlight=False
      )
      bar.advance(task)
  return rows


def changed(row: dict[str, Any]) -> bool:
  return row["verdict"] != row["expected"]


def show(rows: list[dict[str, Any]]) -> bool:
  """Prints the table, then the deviations from expectations; tells whether there are none."""
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  table = Table(title="Claims of the text this project started from, measured", show_lines=True)
  table.add_column("claim", ratio=7)
  table.add_column("measured", ratio=7)
  table.add_column("numbers", ratio=5)
  table.add_column("verdict", ratio=5)
  for row in rows:
    numbers = "\n".join(f"{key}: {_shown(value)}" for key, value in row["numbers"].items())
    verdict = escape(row["verdict"] or f"not measured: {row['error']}")
    if changed(row):
      verdict = f"[red]{verdict}, expected: {row['expected']}[/red]"
    if row.get("correction"):
      verdict += f":\n{escape(row['correction'])}"
    said = f"[bold]{row['name']}[/bold]\n{escape(row['says'])}"
    measured = escape(f"{row['measured_by']}. Holds if: {row['holds_if']}.")
    table.add_row(said, measured, escape(numbers), verdict)
  console = Console(width=160, highlight=False)
  console.print(table)
  counts: dict[str, int] = {}
  for row in rows:
    counts[row["verdict"] or "not measured"] = counts.get(row["verdict"] or "not measured", 0) + 1
  tally = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
  console.print(f"{len(rows)} claims: {tally}; {sum(row['seconds'] for row in rows):.0f} seconds")
  for row in filter(changed, rows):
    got = row["verdict"] or row["error"]
    told = f"CHANGED {row['name']}: {got!r}, expected {row['expected']!r}"
    console.print(told, markup=False, soft_wrap=True)
  return not any(map(changed, rows))


def _shown(value: float) -> str:
  return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def write(rows: list[dict[str, Any]], path: str) -> None:
  """Writes one JSON line per row, with its origin, in the catalogue's order.

  Lines of other existing claims stay. The file is as it was until all are there.
  """
  from experiments.benchmarks import report
  from experiments.claims import catalogue
  from peftjax.training import workdir
  from peftjax.training.logs import write_atomic

  common = report.origin("claims")
  file = Path(path)
  named: dict[str, dict[str, Any]] = {}
  for where, row in workdir.rows(file, "Take the line out."):
    if not isinstance(row.get("name"), str):
      raise ValueError(f"{where} names no claim. Take the line out.")
    named[row["name"]] = row
  named |= {row["name"]: {**row, **common} for row in rows}
  order = [claim.name for claim in catalogue.CLAIMS if claim.name in named]
  write_atomic(file, "".join(json.dumps(named[name]) + "\n" for name in order))


if __name__ == "__main__":
  app.run(main, flags_parser=runtime.parse_flags)

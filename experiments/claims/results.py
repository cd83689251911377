"""Numbers of committed results: what takes too long to be measured again for a claim."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.tables import cells, trials
from experiments.tables.trials import Trial

FOLDER = Path(__file__).parents[1] / "results" / "tables"


def rows(name: str) -> dict[str, dict[str, Any]]:
  """The rows of a table by cell.

  Raises:
    ValueError: if there are none.
  """
  found = cells.rows(FOLDER / f"{name}.jsonl")
  if not found:
    raise ValueError(f"no {name}.jsonl in {FOLDER}: `python -m experiments.tables {name}` makes it")
  return found


def runs(table: str, wanted: Iterable[Trial]) -> dict[Trial, list[dict[str, Any]]]:
  """The rows of a table of runs by trial, a seed each.

  Raises:
    ValueError: one is missing, or of another config than the table asks for.
  """
  wanted, file = list(wanted), FOLDER / f"{trials.RESULTS}.jsonl"
  missing = [cell.name for cell in cells.left(trials.cells(wanted, FOLDER), file)]
  if missing:
    rest = f" and {len(missing) - 1} more" if missing[1:] else ""
    raise ValueError(
      f"no result of {missing[0]!r}{rest}: `python -m experiments.tables {table}` computes it"
    )
  return trials.by_trial(wanted, list(cells.rows(file).values()))


def perplexity(base: str, when: str, part: str) -> dict[int, float]:
  """By seed, of table qlora_vs_lora: "before" or "after", on "test" or "other".

  Raises:
    ValueError: if it has no run over that base.
  """
  found = {
    row["seed"]: row[when][part]["perplexity"]
    for name, row in rows("qlora_vs_lora").items()
    if name == f"{base}-{row['seed']}"
  }
  if not found:
    raise ValueError(
      f"no result of '{base}-0': `python -m experiments.tables qlora_vs_lora` computes it"
    )
  return found

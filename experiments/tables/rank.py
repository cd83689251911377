"""How much rank LoRA needs, for q, for q and v, and for all of attention, beside LoRA's table 6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.tables import trials
from experiments.tables.cells import Cell
from experiments.tables.methods import accuracy
from experiments.tables.report import Report, mean
from experiments.tables.trials import Trial
from experiments.tables.which_matrices import DATA, OUT, lora

RESULTS = trials.RESULTS
RANKS = (1, 4, 8, 64)
# The matrices and what LoRA's table 6 prints of MultiNLI at these ranks.
CHOICES = (
  ("q", ("query",), "90.7 / 91.1 / 90.7 / 90.7"),
  ("q, v", ("query", "value"), "91.3 / 91.3 / 91.6 / 91.4"),
  ("q, k, v, o", ("query", "key", "value", OUT), "91.2 / 91.7 / 91.5 / 91.4"),
)


def wanted() -> list[Trial]:
  return [lora(targets, rank) for rank in RANKS for _, targets, _ in CHOICES]


def cells(folder: Path) -> list[Cell]:
  return trials.cells(wanted(), folder)


def table(rows: list[dict[str, Any]]) -> Report:
  found = trials.by_trial(wanted(), rows)
  lines = []
  for name, targets, printed in CHOICES:
    score = lambda rank, t=targets: mean([*map(accuracy, found[lora(t, rank)])])
    lines.append([name, *map(score, RANKS), printed])
  columns = ["matrices", *(f"r={rank}" for rank in RANKS), "LoRA t. 6 (MultiNLI)"]
  title = f"Test accuracy of LoRA on {DATA}, %, alpha 16 at every rank. {trials.HEADER}."
  return Report(title, columns, lines, NOTES)


NOTES = ("LoRA t. 6: Hu et al. 2021, GPT-3 175B, ± 0.1, at the same ranks.",)

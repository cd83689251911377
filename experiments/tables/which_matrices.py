"""Which matrices to adapt at one number of parameters, beside LoRA's table 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.tables import trials
from experiments.tables.cells import Cell
from experiments.tables.methods import accuracy
from experiments.tables.report import Report, mean
from experiments.tables.trials import Trial, trial

RESULTS = trials.RESULTS
DATA = "sentiment"
OUT = r".*/attention/output/dense/kernel"
# The matrices, the rank that gives all lines one number of parameters, and what LoRA's table 5
# prints of MultiNLI.
CHOICES = (
  ("q", ("query",), 8, "91.0"),
  ("k", ("key",), 8, "90.8"),
  ("v", ("value",), 8, "91.0"),
  ("o", (OUT,), 8, "91.3"),
  ("q, k", ("query", "key"), 4, "91.3"),
  ("q, v", ("query", "value"), 4, "91.3"),
  ("q, k, v, o", ("query", "key", "value", OUT), 2, "91.7"),
)


def lora(targets: tuple[str, ...], rank: int) -> Trial:
  return trial(DATA, "lora", targets=targets, rank=rank, dropout=0.0)


def wanted() -> list[Trial]:
  return [lora(targets, rank) for _, targets, rank, _ in CHOICES]


def cells(folder: Path) -> list[Cell]:
  return trials.cells(wanted(), folder)


def table(rows: list[dict[str, Any]]) -> Report:
  found = trials.by_trial(wanted(), rows)
  lines = []
  for name, targets, rank, printed in CHOICES:
    own = found[lora(targets, rank)]
    trained = own[0]["trainable_params"]
    lines.append([name, str(rank), f"{trained:,}", mean([*map(accuracy, own)]), printed])
  columns = ["matrices", "r", "trained", "accuracy", "LoRA t. 5 (MultiNLI)"]
  title = f"Test accuracy of LoRA on {DATA}, %. {trials.HEADER}."
  return Report(title, columns, lines, NOTES)


NOTES = ("LoRA t. 5: Hu et al. 2021, GPT-3 175B, ± 0.1. trained: the head of the task among them.",)

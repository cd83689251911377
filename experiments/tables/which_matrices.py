"""The matrices to adapt at one number of parameters, beside LoRA's table 5."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.tables.report import Report, mean
from experiments.tables.runs import (
  CLASSIFIER,
  HEADER,
  Overrides,
  Row,
  accuracy,
  by_trial,
  sweep,
  trial,
)

RESULTS = CLASSIFIER
DATA = "sentiment"
OUT = r".*/attention/output/dense/kernel"
# The matrices, the rank that gives all lines one number of parameters, and the scores on MultiNLI
# in LoRA's table 5.
CHOICES = (
  ("q", ("query",), 8, "91.0"),
  ("k", ("key",), 8, "90.8"),
  ("v", ("value",), 8, "91.0"),
  ("o", (OUT,), 8, "91.3"),
  ("q, k", ("query", "key"), 4, "91.3"),
  ("q, v", ("query", "value"), 4, "91.3"),
  ("q, k, v, o", ("query", "key", "value", OUT), 2, "91.7"),
)


def lora(targets: tuple[str, ...], rank: int) -> Overrides:
  return trial(DATA, "lora", targets=targets, rank=rank, dropout=0.0)


def get_config() -> ConfigDict:
  return sweep(lora(targets, rank) for _, targets, rank, _ in CHOICES)


def table(rows: list[Row]) -> Report:
  lines = []
  for (name, _, rank, printed), own in zip(CHOICES, by_trial(rows), strict=True):
    trained = own[0]["trainable_params"]
    lines.append([name, str(rank), f"{trained:,}", mean([*map(accuracy, own)]), printed])
  columns = ["matrices", "r", "trained", "accuracy", "LoRA t. 5 (MultiNLI)"]
  title = f"Test accuracy of LoRA on {DATA}, %. {HEADER}."
  return Report(title, columns, lines, NOTES)


NOTES = ("LoRA t. 5: Hu et al. 2021, GPT-3 175B, ± 0.1. trained: the head of the task among them.",)

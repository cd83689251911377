"""The rank LoRA needs, for q, for q and v, and for all of attention, beside LoRA's table 6."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.tables.report import Report, mean
from experiments.tables.runs import CLASSIFIER, HEADER, Row, accuracy, by_trial, sweep
from experiments.tables.which_matrices import DATA, OUT, lora

RESULTS = CLASSIFIER
RANKS = (1, 4, 8, 64)
# The matrices and the scores on MultiNLI in LoRA's table 6 at these ranks.
CHOICES = (
  ("q", ("query",), "90.7 / 91.1 / 90.7 / 90.7"),
  ("q, v", ("query", "value"), "91.3 / 91.3 / 91.6 / 91.4"),
  ("q, k, v, o", ("query", "key", "value", OUT), "91.2 / 91.7 / 91.5 / 91.4"),
)


def get_config() -> ConfigDict:
  return sweep(lora(targets, rank) for _, targets, _ in CHOICES for rank in RANKS)


def table(rows: list[Row]) -> Report:
  scores = [mean([*map(accuracy, own)]) for own in by_trial(rows)]
  lines = [
    [name, *scores[i * len(RANKS) :][: len(RANKS)], printed]
    for i, (name, _, printed) in enumerate(CHOICES)
  ]
  columns = ["matrices", *(f"r={rank}" for rank in RANKS), "LoRA t. 6 (MultiNLI)"]
  title = f"Test accuracy of LoRA on {DATA}, %, alpha 16 at every rank. {HEADER}."
  return Report(title, columns, lines, NOTES)


NOTES = ("LoRA t. 6: Hu et al. 2021, GPT-3 175B, ± 0.1, at the same ranks.",)

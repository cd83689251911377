"""Every method on two tasks: LoRA's table 2 and AdaLoRA's table 1 in the small.

Beside each stands, where the papers have it, the GLUE average of RoBERTa-base (Hu et al. 2021,
table 2) and of DeBERTaV3-base (Zhang et al. 2023, table 1).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import plots
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
CORPORA = ("sentiment", "bbc")


class Line(NamedTuple):
  """A method by name, its trial on a corpus, and the papers' numbers."""

  name: str
  of: Callable[[str], Overrides]
  lora: str = ""
  adalora: str = ""


LINES = (
  Line("full fine-tuning", lambda d: trial(d, "full"), "86.4 (125.0M)", "88.09 (184M)"),
  Line("head only", lambda d: trial(d, "head")),
  Line("BitFit", lambda d: trial(d, "bitfit"), "85.2 (0.1M)", "86.02 (0.1M)"),
  Line("Houlsby, M=32", lambda d: adapter(d, "houlsby", 32), "", "88.12 (1.22M)"),
  Line("Pfeiffer, M=64", lambda d: adapter(d, "pfeiffer", 64), "", "88.24 (1.18M)"),
  Line("parallel, M=64", lambda d: adapter(d, "parallel", 64)),
  Line(
    "scaled parallel, M=64",
    # Its scale is 4: the best rate of the learning_rate sweep is a tenth of the others'.
    lambda d: adapter(d, "scaled_parallel", 64, learning_rate=3e-4),
  ),
  Line("LoRA q,v, r=8", lambda d: trial(d, "lora"), "87.2 (0.3M)"),
  Line("LoRA all, r=8", lambda d: lora_all(d, 8), "", "88.34 (1.33M)"),
  Line("DoRA q,v, r=8", lambda d: trial(d, "dora")),
  Line("IA3", lambda d: trial(d, "ia3")),
  Line("AdaLoRA all, 12 to 8", lambda d: adalora(d, 8), "", "89.31 (1.27M)"),
)


def adapter(
  data: str, placement: str, size: int, *, learning_rate: float | None = None
) -> Overrides:
  return trial(data, "adapters", learning_rate=learning_rate, placement=placement, size=size)


def lora_all(data: str, rank: int) -> Overrides:
  return trial(data, "lora", targets=("all-linear",), rank=rank, dropout=0.0)


def adalora(data: str, budget: int, **changes: Any) -> Overrides:
  """A trial from 1.5 times the budget per matrix, at least one more, down to it; see `trial`."""
  rank = max(budget + 1, budget * 3 // 2)
  return trial(data, "adalora", target_rank=float(budget), rank=rank, **changes)


def get_config() -> ConfigDict:
  return sweep(line.of(data) for line in LINES for data in CORPORA)


def table(rows: list[Row]) -> Report:
  found, lines = by_trial(rows), []
  for i, line in enumerate(LINES):
    own = found[2 * i : 2 * i + 2]
    scores = [[*map(accuracy, each)] for each in own]
    trained = own[0][0]["trainable_params"]
    of_means, of_medians = (
      f"{statistics.mean(map(rule, scores)):.2f}" for rule in (statistics.mean, statistics.median)
    )
    lines.append(
      [line.name, f"{trained:,}", *map(mean, scores), of_medians, line.lora, of_means, line.adalora]
    )
  columns = ["method", "trained", *CORPORA]
  columns += ["medians", "LoRA t. 2", "means", "AdaLoRA t. 1"]
  return Report(f"Test accuracy, %. {HEADER}.", columns, lines, NOTES)


def pictures(rows: list[Row], folder: Path) -> None:
  plots.pareto(rows, folder / "methods_pareto.png")


NOTES = (
  "trained: parameters, the head of the task among them (on bbc 770 more). The papers print GLUE "
  "averages of RoBERTa-base and DeBERTaV3-base with the parameters trained, heads left out. For "
  "AdaLoRA they are those of its first rank, 12; in the end 8 are left, which its paper counts.",
  "LoRA q,v and DoRA have a dropout of 0.1, all other methods none of their own.",
  "medians, means: over the seeds, averaged over the tasks, as in LoRA's and AdaLoRA's tables.",
)

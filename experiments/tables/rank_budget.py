"""AdaLoRA against LoRA at equal budgets, beside the SST-2 columns of AdaLoRA's table 5.

A budget is the rank left per matrix; AdaLoRA begins with 1.5 times as many triplets, or one
more.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from experiments import plots
from experiments.tables.methods import adalora, lora_all
from experiments.tables.report import Report, mean
from experiments.tables.runs import CLASSIFIER, HEADER, Row, accuracy, by_trial, sweep

RESULTS = CLASSIFIER
BUDGETS = (1, 2, 4, 8)
DATA = "sentiment"
# Zhang et al. 2023, table 5, SST-2 at .08, .16, .32 and .65 % of the parameters.
PRINTED = {"LoRA": ("94.38", "94.95", "", "94.95"), "AdaLoRA": ("95.64", "95.80", "96.10", "96.10")}


def get_config() -> ConfigDict:
  return sweep(of(DATA, budget) for budget in BUDGETS for of in (lora_all, adalora))


def table(rows: list[Row]) -> Report:
  found, lines = by_trial(rows), []
  for i, budget in enumerate(BUDGETS):
    lora, ada = found[2 * i], found[2 * i + 1]
    apart = [accuracy(b) - accuracy(a) for a, b in zip(lora, ada, strict=True)]
    scores = [mean([accuracy(row) for row in own]) for own in (lora, ada)]
    printed = [values[i] for values in PRINTED.values()]
    lines.append([str(budget), *scores, mean(apart, "+.2f"), *printed])
  columns = ["budget", "LoRA", "AdaLoRA", "difference by seed", "LoRA, t. 5", "AdaLoRA, t. 5"]
  title = f"Test accuracy on {DATA}, %, all linear layers. {HEADER}."
  return Report(title, columns, lines, NOTES)


def pictures(rows: list[Row], folder: Path) -> None:
  plots.pareto(rows, folder / "rank_budget_pareto.png")
  plots.ranks(rows, folder / "rank_budget_ranks.png")


NOTES = (
  "budget: rank per matrix, which AdaLoRA ends with; it begins with 2, 3, 6 and 12. Learning rates "
  "and alpha, 16, are those of budget 8 throughout, so LoRA's scale is 2 there and 16 at budget 1.",
  "t. 5: Zhang et al. 2023, DeBERTaV3-base on SST-2, mean of 5 seeds.",
)
